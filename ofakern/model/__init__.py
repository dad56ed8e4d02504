"""OFA+: the generalist encoder-decoder. It knows no vocabulary, instruction or loss."""
