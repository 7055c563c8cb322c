"""Seconds for 128 new tokens: with the cache, without it, and `transformers`' generate, on the shipped GPT.

    python -m experiments.decoding_time [threads]      writes experiments/results/decoding.csv

Alternating in one process, medians; all ways must write the same tokens.
"""
import statistics
import sys
import time

import torch
import transformers

from checkpoints.pretrained import MODELS, from_pretrained
from evaluation import decoding
from experiments.compare import RESULTS, write_csv

NEW, PROMPT, REPEATS = 128, 30, 7


def main():
    if len(sys.argv) > 1:
        torch.set_num_threads(int(sys.argv[1]))
    model = from_pretrained("tiny-gpt").eval()
    theirs = transformers.GPT2LMHeadModel.from_pretrained(MODELS["tiny-gpt"], dtype=torch.float32).eval()
    torch.manual_seed(0)
    rows = []

    @torch.no_grad()
    def uncached(prompts):
        ids = torch.tensor(prompts)
        for _ in range(NEW):
            ids = torch.cat([ids, model(ids)[0][:, -1].argmax(-1, keepdim=True)], 1)
        return ids[:, PROMPT:].tolist()

    for prompts, beams in ((1, 1), (16, 1), (1, 10), (8, 4)):
        some = torch.randint(0, 2000, (prompts, PROMPT)).tolist()

        def cached(some, beams=beams):
            return (decoding.generate(model, some, NEW, -1) if beams == 1 else
                    decoding.beam_search(model, some, NEW, -1, beams, 0.9))

        def peer(some, beams=beams):
            idx = torch.tensor(some)
            return theirs.generate(idx, attention_mask=torch.ones_like(idx), max_new_tokens=NEW, do_sample=False,
                                   num_beams=beams, length_penalty=0.9, eos_token_id=None,
                                   pad_token_id=0)[:, PROMPT:].tolist()
        ways = {"cached": cached, "transformers": peer, **({"uncached": uncached} if beams == 1 else {})}
        seconds = {name: [] for name in ways}
        for _ in range(REPEATS):
            texts = []
            for name, way in ways.items():
                begun = time.time()
                texts.append(way(some))
                seconds[name].append(time.time() - begun)
            if any(text != texts[0] for text in texts):
                raise RuntimeError(f"the ways write different tokens: {', '.join(ways)}")
        median = {name: statistics.median(values[1:]) for name, values in seconds.items()}
        rows += [{"prompts": prompts, "beams": beams, "way": name, "seconds": f"{value:.3f}",
                  "of cached": f"{value / median['cached']:.2f}"} for name, value in median.items()]
        print(f"{prompts:2} prompts, {beams:2} beams: " + ", ".join(
            f"{name} {value:.3f} s" + f" ({value / median['cached']:.2f} x)" * (name != "cached")
            for name, value in median.items()))
    write_csv(RESULTS / "decoding.csv", rows)


if __name__ == "__main__":
    main()
