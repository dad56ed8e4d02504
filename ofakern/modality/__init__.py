"""One room per modality: preprocessing, adaptor, postprocessing."""
