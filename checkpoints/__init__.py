"""Files: the hub's downloads, tokenizers, pretrained folders, adapters, and the state to resume
from."""
