"""AUDIO slots: sound to filter banks and tokens in the source, frames of speech in the target."""
