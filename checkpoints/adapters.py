"""The adapter as PEFT reads and writes it: adapter_config.json and adapter_model.safetensors.

    save_adapter(folder, model, base)    what was trained, as an ordinary LoRA with the same logits
    load_adapter(model, folder)          an adapter folder, ours or PEFT's, into a model without one

The model is one of ours or one of `transformers`, whose modules keep their names.

How each method becomes a PEFT adapter:

    LoRA, rsLoRA           a LoRA of rank r; GPT-2's q, k and v share one c_attn, so there of
                           rank 2 r for q and v
    ResLoRA block          a LoRA whose rank grows along the chain: (min(m, n) + 1) r for layer n,
                           filled up with zeros
    ResLoRA input, middle  a LoRA of rank r, after the approximate merge
    Delta-LoRA             a LoRA of rank 2 r: [A_T ; A_K] and [(1 + lambda) B_T | -lambda B_K]
    AdaLoRA                a LoRA of the ranks that the layers kept, E folded into B, filled up with
                           zeros; layers of rank 0 are left out
    DyLoRA                 a LoRA of rank b, the cut
    LoHa, LoKr             PEFT's own LOHA and LOKR; on GPT-2, whose Conv1D those refuse, a LoRA

All layers have one rank and one scale in the folder, because some loaders read lora_alpha over the
rank of each tensor (llama.cpp), and others one lora_alpha / r for all (vLLM). A layer whose smaller
side is below that rank has that side's, with the scale in its B.

A classifier's folder is a SEQ_CLS adapter with the head in it.
"""
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from checkpoints.families import family
from checkpoints.files import check_keys, fingerprint, write, write_json
from checkpoints.peft_format import PREFIX, peft_scaling, read_adapter, take_head
from lora import LoRALinear
from model import Transformer

WRAPPERS = torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel


def fingerprint_adapter(folder):
    """16 hex digits that change with an adapter's weights or its config, which holds the scale."""
    return "-".join(fingerprint(Path(folder) / f"adapter_{name}")
                    for name in ("config.json", "model.safetensors"))


def has_head(folder):
    """Whether an adapter folder brings a classifier's head."""
    path = Path(folder or "") / "adapter_model.safetensors"
    if folder is None or not path.exists():
        return False
    try:
        with safe_open(path, "pt") as f:
            return any(".classifier." in name for name in f.keys())
    except SafetensorError:
        return False  # read_adapter says what is wrong


def peft_lora(model):
    """(tensors, config) of the plain LoRA that the adapters amount to. GPT-2's q, k and v become
    one c_attn: their A stacked, their B in blocks,

        c_attn:  B' A' = [B_q 0 ; 0 0 ; 0 B_v] [A_q ; A_v]        for q and v, of rank 2 r

    PEFT's scale is lora_alpha / rank of each module. use_rslora stays false, and loaders that do
    not know that flag read the adapter right.
    """
    modules = {}  # {module: (A, B, scaling)}
    for name, layer in adapters(model):
        A, B = no_wider(*(t.detach().float() for t in layer.as_lora()))
        if not len(A):
            continue  # AdaLoRA left this layer no rank
        scaling = layer.scaling
        module, third = family(model).module(name)
        if third is not None:
            rows = B.new_zeros(3 * len(B), B.shape[1])
            rows[third * len(B):(third + 1) * len(B)] = B
            B = rows
        if module in modules:
            A_before, B_before, scaling = modules[module]
            A, B = (torch.cat([A_before, A]),
                    torch.cat([B_before, B * (layer.scaling / scaling)], 1))
        modules[module] = A, B, scaling
    if not modules:
        raise ValueError("there is no adapter to write: no layer has a rank")
    # GPT-2's c_attn may have more ranks together than it has sides
    modules = {module: (*no_wider(A, B), scaling) for module, (A, B, scaling) in modules.items()}
    r = max(len(A) for A, _, _ in modules.values())
    alpha, tensors, ranks = r * next(iter(modules.values()))[2], {}, {}
    for module, (A, B, scaling) in modules.items():
        ranks[module] = min(r, A.shape[1], len(B))
        empty = ranks[module] - len(A)
        share = scaling * ranks[module] / alpha  # 1, but where the scale or the rank is another
        tensors[f"{module}.lora_A.weight"] = F.pad(A, (0, 0, 0, empty))
        tensors[f"{module}.lora_B.weight"] = F.pad(B, (0, empty)) * share
    return tensors, {
        "peft_type": "LORA", "r": r, "lora_alpha": alpha, "use_rslora": False,
        "rank_pattern": {module: rank for module, rank in ranks.items() if rank != r},
        "alpha_pattern": {}, "target_modules": targets_of(model, modules),
        "fan_in_fan_out": family(model).conv1d, "bias": "none"}


def peft_own(model):
    """The same for LoHa and LoKr, which PEFT has under the same names of factors, for nn.Linear
    only: not for GPT-2."""
    tensors, modules = {}, set()
    for name, layer in adapters(model):
        module, _ = family(model).module(name)
        modules.add(module)
        factors = {key: p.detach() for key, p in layer.named_parameters(recurse=False)
                   if key not in ("weight", "bias")}
        tensors.update({f"{module}.{key}": p for key, p in factors.items()})
    return tensors, {"peft_type": layer.peft_type, "r": layer.r, "alpha": layer.scaling * layer.r,
                     "target_modules": targets_of(model, modules)}


def adapters(model):
    """[(name, layer)]"""
    return [(name, m) for name, m in model.named_modules() if isinstance(m, LoRALinear)]


def linears(model, kinds):
    """{name: linear} of the places for adapters: in our models those of the blocks, else all."""
    blocks = "h." if isinstance(model, Transformer) else ""
    return {name: m for name, m in model.named_modules() if isinstance(m, kinds)
            and name.startswith(blocks)}


def trained_beside(model):
    """{name: parameter} of what trains beside the adapters: a classifier's head."""
    inside = {id(p) for _, layer in adapters(model) for p in layer.parameters()}
    return {name: p for name, p in model.named_parameters() if p.requires_grad
            and id(p) not in inside}


def task_of(model):
    """PEFT's task_type, and its auto_mapping where it has no such type: what AutoPeft makes."""
    if isinstance(model, Transformer):
        return "CAUSAL_LM" if model.causal else "SEQ_CLS" if model.classifier else None, None
    ends = {"ForCausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM",
            "ForSequenceClassification": "SEQ_CLS", "ForTokenClassification": "TOKEN_CLS",
            "ForQuestionAnswering": "QUESTION_ANS"}
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        ends["ForConditionalGeneration"] = "SEQ_2_SEQ_LM"
    kind = type(model)
    task = next((task for end, task in ends.items() if kind.__name__.endswith(end)), None)
    return task, None if task else {"base_model_class": kind.__name__,
                                    "parent_library": kind.__module__}


def unwrapped(model):
    """The model inside of torch.compile, DataParallel and DDP. ValueError for a model of PEFT."""
    while isinstance(model, WRAPPERS) or "_orig_mod" in model._modules:
        model = model.module if isinstance(model, WRAPPERS) else model._orig_mod
    for name, m in model.named_modules():
        if type(m).__module__.startswith("peft."):
            raise ValueError(f"{name or 'the model'} is PEFT's {type(m).__name__}: take its "
                             "adapters out first, by merge_and_unload() or unload()")
    return model


def no_wider(A, B):
    """(A, B) with the same product and a rank of at most min(d_in, d_out)."""
    d_in, d_out = A.shape[1], len(B)
    if len(A) <= min(d_in, d_out):
        return A, B
    return (torch.eye(d_in), (B @ A).cpu()) if d_in <= d_out else ((B @ A).cpu(), torch.eye(d_out))


def targets_of(model, modules):
    """PEFT's target_modules: the ends of the names ("attn.c_attn"), or the whole names where ends
    mean other modules too ("output.dense" is also the end of "attention.output.dense")."""
    ends = sorted({re.sub(r"^.*?\.\d+\.", "", module) for module in modules})
    known = {family(model).module(name)[0]
             for name in linears(model, (torch.nn.Linear, LoRALinear))}
    meant = {module for module in known if any(module.endswith("." + end) for end in ends)}
    return ends if meant == set(modules) else sorted(modules)


def save_adapter(folder, model, base, dropout=0.0):
    """Write adapter_config.json and adapter_model.safetensors, with a classifier's head in it: of
    our models always, of others what has requires_grad beside the adapters. Call it after
    `calibrate` and before `merge`. ValueError for a value that is not finite."""
    folder, model = Path(folder), unwrapped(model)
    kinds = {layer.peft_type for _, layer in adapters(model)}
    if not kinds:
        raise ValueError("there is no adapter to write: the model holds none (any more)")
    with torch.no_grad():
        tensors, config = (peft_lora if kinds == {"LORA"} or family(model).conv1d
                           else peft_own)(model)
    for name, t in tensors.items():
        if not t.isfinite().all():
            raise ValueError(f"the adapter holds NaN or inf in {name}: it is not written")
    if config["peft_type"] == "LORA":
        config["lora_dropout"] = dropout
    if isinstance(model, Transformer):
        head = {f"classifier.{key}": t
                for key, t in model.classifier.state_dict().items()} if model.classifier else {}
        modules = ["classifier", "score"] * bool(head)
    else:
        head = {name: p.detach() for name, p in trained_beside(model).items()}
        uses = [id(p) for _, p in model.named_parameters(remove_duplicate=False)]
        for name in head:
            if uses.count(id(model.get_parameter(name))) > 1:
                raise ValueError(f"{name} trains beside the adapters and is tied to another "
                                 "module: PEFT would load it into one of them alone. Freeze it, or "
                                 "untie them")
        modules = sorted({name.rpartition(".")[0] for name in head})
    task, mapping = task_of(model)
    config.update({"task_type": task, "auto_mapping": mapping, "base_model_name_or_path": str(base),
                   "inference_mode": True, "modules_to_save": modules or None})
    tensors.update(head)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {PREFIX + name: t.float().cpu().contiguous() for name, t in tensors.items()}
    write(folder / "adapter_model.safetensors",
          lambda part: save_file(tensors, part, {"format": "pt"}))
    write_json(folder / "adapter_config.json", config)


def load_adapter(model, folder, dropout=0.0):
    """Put an adapter folder, ours or PEFT's, into a model that has none: plain LoRA layers, and a
    head if there is one.

    Returns the layers. A c_attn of GPT-2 becomes an adapter on each of q, k and v, with the rows of
    A that its third of B uses. A linear that the file does not mention gets none; its dropout is
    not taken over. Where the file has no head for a classifier, the model's stays and a line says
    so. Raises ValueError, and leaves the model as it was, for half an adapter, unexpected or
    mis-shaped tensors, and what is no plain LoRA.
    """
    model = unwrapped(model)
    if adapters(model):
        raise ValueError(f"{folder} cannot be loaded: the model has adapters already")
    folder, prefix = Path(folder), family(model).prefix
    path = folder / "adapter_model.safetensors"
    config, tensors, origin = read_adapter(folder)
    if not any(name.startswith(prefix) for name in tensors):  # made on a bare model of ours
        tensors, origin = ({name if name.startswith("classifier.") else prefix + name: value
                            for name, value in names.items()} for names in (tensors, origin))
    ours = isinstance(model, Transformer)
    if ours:
        head, others = take_head(tensors, prefix)
    else:
        head, others = {name: tensors.pop(name) for name in list(tensors)
                        if "lora_" not in name}, []
    if head:
        wanted = {name: p for name, p in model.named_parameters()
                  if (name.startswith("classifier.") if ours else name in head)}
        check_keys(head, wanted, f"{path}, head,", lambda name: origin.get(name, PREFIX + name))

    linear_of, places, wanted = linears(model, torch.nn.Linear), {}, {}
    for name, linear in linear_of.items():
        module, third = family(model).module(name)
        if f"{module}.lora_A.weight" in tensors:
            if type(linear) is not torch.nn.Linear:
                raise ValueError(f"{name} is a {type(linear).__name__}, which computes its product "
                                 "in a way of its own: an adapter needs an nn.Linear")
            places[name] = module, third
            rank = len(tensors[f"{module}.lora_A.weight"])
            wanted[f"{module}.lora_A.weight"] = torch.empty(rank, linear.in_features, device="meta")
            d_out = linear.out_features * (1 if third is None else 3)
            wanted[f"{module}.lora_B.weight"] = torch.empty(d_out, rank, device="meta")
    for name, m in model.named_modules():
        if f"{name}.lora_A.weight" in tensors.keys() - wanted.keys():
            raise ValueError(f"{path} adapts {name}, which is a {type(m).__name__}: an adapter "
                             "needs an nn.Linear")
    check_keys(tensors, wanted, path, lambda name: origin.get(name, PREFIX + name))
    if not places:
        raise ValueError(f"{path} holds no adapter for this model")
    layers = {}
    for name, (module, third) in places.items():
        A, B = (tensors[f"{module}.lora_{factor}.weight"] for factor in "AB")
        scaling = peft_scaling(config, module, len(A), folder)
        trained = B.any()
        if third is not None:
            B = B.chunk(3)[third]
        # not what peft_lora has filled up with zeros
        used = A.any(1) & (B.any(0) if trained and third is not None else True)
        A, B = A[used], B[:, used]
        if len(A):
            layers[name] = with_factors(linear_of[name], *no_wider(A, B), scaling, dropout)
    model.requires_grad_(False)
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    for name, t in head.items():
        with torch.no_grad():
            model.get_parameter(name).copy_(t)
        model.get_parameter(name).requires_grad_(True)
    if ours and not head and (model.classifier or others):
        left_out = f" (left out: {', '.join(others)})" * bool(others)
        print(f"head     {folder} has no head for this task: the model's own stays{left_out}")
    if ours and model.classifier:
        model.classifier.requires_grad_(True)
    return list(layers.values())


@torch.no_grad()
def with_factors(linear, A, B, scaling, dropout):
    """A LoRA layer in the place of `linear`, with these factors."""
    layer = LoRALinear(linear, len(A), scaling * len(A), dropout).train(linear.training)
    layer.lora_A.copy_(A)
    layer.lora_B.copy_(B)
    return layer
