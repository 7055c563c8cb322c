"""What the examples run on where there is no network: tiny models with random weights, and data
that is drawn on the spot."""
import random

import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers

WORDS = [a + b for a in ("ba", "de", "ki", "lo", "mu", "ra") for b in "nlstx"]


def texts(kept, n):
    """[(eight words, those of them that are kept)]"""
    drawn = [random.Random(f"{kept} {i}").sample(WORDS, 8) for i in range(n)]
    return [(" ".join(words), " ".join(words[kept])) for words in drawn]


def summariser(t5):
    """A BART or T5 of 250,000 random weights and its tokenizer, of thirty words."""
    ids = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", *WORDS])}
    words = Tokenizer(models.WordLevel(ids, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>",
                                           bos_token="<s>", eos_token="</s>")
    same = dict(vocab_size=len(ids), d_model=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
                decoder_start_token_id=2, forced_eos_token_id=None)
    sizes = {f"{part}_{name}": size for part in ("encoder", "decoder") for name, size in
             {"layers": 2, "attention_heads": 4, "ffn_dim": 128}.items()}
    model = (hf.T5ForConditionalGeneration(hf.T5Config(**same, num_layers=2, num_heads=4, d_kv=16,
                                                       d_ff=128, dropout_rate=0.0)) if t5 else
             hf.BartForConditionalGeneration(hf.BartConfig(**same, **sizes, dropout=0.0,
                                                           init_std=0.1)))
    return model, tokenizer


def shapes(n, outlined, size=16, seed=0, noise=0.0):
    """(pictures (n, 3, size, size) in [-1, 1], kinds (n,): circle, square, triangle), anywhere and
    of any size: filled and bright on dark ground, or outlined and dark on bright ground."""
    draw = torch.Generator().manual_seed(seed + 10**6 * outlined)
    kinds = torch.randint(3, (n,), generator=draw)
    radius = 3 + 2.5 * torch.rand(n, 1, 1, generator=draw)
    centre = 6 + 4 * torch.rand(n, 2, 1, 1, generator=draw)
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    x, y = x - centre[:, 0], y - centre[:, 1]  # (n, size, size)
    distance = torch.stack([(x**2 + y**2).sqrt(), torch.maximum(x.abs(), y.abs()),
                            torch.maximum(y, 2 * x.abs() - y)])[kinds, torch.arange(n)]
    inside = distance < radius
    if outlined:
        inside &= distance > radius - 1.5
    colour = torch.rand(n, 3, 1, 1, generator=draw) * 0.7 + 0.3
    picture = inside[:, None] * colour * 2 - 1
    picture = -picture if outlined else picture
    return picture + noise * torch.randn(picture.shape, generator=draw), kinds


def classifier():
    """A ViT of 100,000 random weights for pictures of 16 x 16 and three classes."""
    return hf.ViTForImageClassification(hf.ViTConfig(
        image_size=16, patch_size=4, hidden_size=48, num_hidden_layers=4, num_attention_heads=4,
        intermediate_size=96, num_labels=3, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, initializer_range=0.1))


def painter():
    """A UNet of diffusers with 250,000 random weights for such pictures, which reads the states of
    a text encoder."""
    from diffusers import UNet2DConditionModel  # slow to import
    return UNet2DConditionModel(
        sample_size=16, in_channels=3, out_channels=3, layers_per_block=2, norm_num_groups=8,
        block_out_channels=(16, 32), down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=16,
        attention_head_dim=8)


def words(kinds, new):
    """What a text encoder makes of "a circle, filled" and the like: states (n, 3, 16), one for each
    word, the same for all pictures of a kind and a style."""
    table = torch.randn(6, 16, generator=torch.Generator().manual_seed(5))
    return torch.stack([table[0].expand(len(kinds), -1), table[1 + kinds],
                        table[4 + new].expand(len(kinds), -1)], 1)
