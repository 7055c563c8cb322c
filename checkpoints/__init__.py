"""Files: the hub's downloads, tokenizers, pretrained folders, adapters."""
