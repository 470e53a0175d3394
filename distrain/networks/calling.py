"""How a model is called with a batch's inputs, and its output."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from distrain.config import UserError
from distrain.networks.huggingface import is_transformers


class ModelOutput(NamedTuple):
    """A model's output for a batch. A named tuple, which every wrapper of PyTorch and Accelerate can traverse."""

    logits: Tensor
    """(batch, outputs), or (batch, seq, vocabulary) where tokens are predicted."""
    aux_loss: Tensor | None = None
    """A mean over the batch, 0-d, that is added to the loss of each sample (such as a router's balance)."""
    others: tuple[Tensor, ...] = ()
    """The further tensors of a model that returns a tuple, for losses that take several."""


Convention = Callable[[nn.Module, Any], ModelOutput]
"""Calls a model, wrapped or not, with the inputs of a batch."""


def forward(model: nn.Module, inputs: Tensor | Mapping[str, Tensor]) -> ModelOutput:
    """Call `model`, wrapped or not, with the inputs of a batch; see `calling_convention`."""
    convention = _CONVENTIONS.get(model)
    if convention is None:
        convention = _CONVENTIONS[model] = calling_convention(model)
    return convention(model, inputs)


_CONVENTIONS: weakref.WeakKeyDictionary[nn.Module, Convention] = weakref.WeakKeyDictionary()
"""Of the models that were called; a convention that held its model would keep it in memory to the end."""


def calling_convention(model: nn.Module) -> Convention:
    """Return the function that calls `model`, or any wrapper of it, with the inputs of a batch.

    A tensor is passed as it is, a tuple one by one, and a mapping by name if `forward` takes its keys, otherwise as it
    is. A model of transformers gets tokens as `input_ids` with an attention mask if it has a padding id (or its own
    main input, such as `pixel_values`), and {"source", "target"} as `input_ids` and `decoder_input_ids`. A model may
    return a tensor, a `ModelOutput`, a mapping or named tuple with `logits` and maybe `aux_loss` (a mapping may have
    `out`), or a tuple, whose first tensor goes to metrics and to losses that take one.
    Raises UserError if neither way of calling fits.
    """
    unwrapped = unwrap_model(model)
    if is_transformers(unwrapped):
        return _transformers_convention(unwrapped)
    # the class's, as wrappers on the instance hide the names
    kind, signature = type(unwrapped).__name__, inspect.signature(type(unwrapped).forward)
    by_name: dict[tuple[str, ...], bool] = {}

    def call(model: nn.Module, inputs: Any) -> ModelOutput:
        if isinstance(inputs, Tensor):  # first, as asking for a mapping takes longer
            return model_output(model(inputs))
        if isinstance(inputs, Mapping):
            keys = tuple(inputs)
            named = by_name.get(keys)
            if named is None:
                named = by_name[keys] = _takes_names(kind, signature, keys)
            return model_output(model(**inputs) if named else model(inputs))
        return model_output(model(*inputs) if isinstance(inputs, tuple) else model(inputs))

    return call


def _takes_names(kind: str, signature: inspect.Signature, keys: tuple[str, ...]) -> bool:
    def binds(*args: Any, **kwargs: Any) -> bool:
        try:
            signature.bind(None, *args, **kwargs)
        except TypeError:
            return False
        return True

    if binds(**dict.fromkeys(keys)):
        return True
    if binds(None):
        return False
    takes = ", ".join(str(p) for p in list(signature.parameters.values())[1:])
    raise UserError(
        f"{kind}.forward takes ({takes}), and the inputs of a batch are {', '.join(keys)}; rename its "
        "parameters, or let it take one mapping"
    )


def _transformers_convention(unwrapped: Any) -> Convention:
    kind, takes = type(unwrapped).__name__, set(inspect.signature(type(unwrapped).forward).parameters)
    always: dict[str, Any] = {"return_dict": True}
    packs = _packs(unwrapped, takes)
    always |= {"use_cache": False} if "use_cache" in takes else {}
    masks = "attention_mask" in takes
    main, pad_id = unwrapped.main_input_name, getattr(unwrapped.config, "pad_token_id", None)
    coefficient = getattr(unwrapped.config, "router_aux_loss_coef", 1.0)

    def call(model: nn.Module, inputs: Any) -> ModelOutput:
        if not isinstance(inputs, Mapping):
            named = {main: inputs}
        elif inputs.keys() == {"source", "target"}:
            if "decoder_input_ids" not in takes:
                raise UserError(f"{kind} has no decoder; task seq2seq needs an encoder and a decoder")
            named = {"input_ids": inputs["source"], "decoder_input_ids": inputs["target"]}
        else:
            named = dict(inputs)
        if "position_ids" in named:
            # documents are told apart by their positions, and only where there is no mask
            output = packs(model, named, always)
        else:
            if masks and pad_id is not None and "input_ids" in named and "attention_mask" not in named:
                named["attention_mask"] = named["input_ids"] != pad_id
            if "attention_mask" in named:
                # as tokenizers give it: some models count positions by adding it up in its own dtype
                named["attention_mask"] = named["attention_mask"].long()
            output = model_output(model(**named, **always))
        return output if output.aux_loss is None else output._replace(aux_loss=coefficient * output.aux_loss)

    return call


def _packs(unwrapped: Any, takes: set[str]) -> Callable[[nn.Module, dict[str, Any], dict[str, Any]], ModelOutput]:
    """Return the function that calls a model of transformers with `input_ids` and `position_ids` of several documents.

    Where positions begin anew, its masks for `eager`, `sdpa` and `flex_attention` keep documents apart in each row;
    flash attention does so in a single row, in which all are then put.
    """
    kind, how = type(unwrapped).__name__, str(getattr(unwrapped.config, "_attn_implementation", None))

    def call(model: nn.Module, named: dict[str, Any], always: dict[str, Any]) -> ModelOutput:
        if "position_ids" not in takes:
            raise UserError(
                f"{kind} takes no position_ids, so it cannot keep apart the conversations that share a row; set "
                "data.pack: false"
            )
        if "flash" not in how or "attention_mask" in named:
            return model_output(model(**named, **always))
        shape = named["input_ids"].shape
        output = model_output(model(**{key: each.reshape(1, -1) for key, each in named.items()}, **always))
        return output._replace(logits=output.logits.unflatten(1, shape)[0])

    return call


def model_output(raw: Any) -> ModelOutput:
    """Return what a model's forward has returned as a `ModelOutput`; raises UserError where it holds no logits."""
    if isinstance(raw, Tensor):
        return ModelOutput(raw)
    if isinstance(raw, ModelOutput):
        return raw
    logits: Any = None
    aux_loss: Any = None
    others: tuple[Tensor, ...] = ()
    if isinstance(raw, Mapping):
        logits = raw.get("logits", raw.get("out"))
        aux_loss = raw.get("aux_loss")
    elif isinstance(raw, tuple) and "logits" in getattr(raw, "_fields", ()):
        named = raw._asdict()  # type: ignore[attr-defined]
        logits, aux_loss = named.pop("logits"), named.pop("aux_loss", None)
        others = tuple(each for each in named.values() if isinstance(each, Tensor))
    elif isinstance(raw, tuple | list) and raw:
        logits, *rest = raw
        others = tuple(rest) if all(isinstance(each, Tensor) for each in rest) else ()
    if not isinstance(logits, Tensor):
        found = f"a mapping of {', '.join(map(str, raw))}" if isinstance(raw, Mapping) else type(raw).__name__
        raise UserError(
            f"the model returned {found}; expected a tensor, a tuple that begins with one, a mapping or named tuple "
            "with 'logits', or distrain.models.ModelOutput"
        )
    return ModelOutput(logits, aux_loss, others)


def unwrap_model(model: nn.Module) -> nn.Module:
    """Return the model without the wrappers of torch.compile, DistributedDataParallel and DeepSpeed."""
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while True:
        inside = "_orig_mod" if "_orig_mod" in model._modules else "module"
        if inside == "module" and not isinstance(model, wrappers) and type(model).__name__ != "DeepSpeedEngine":
            return model
        model = model.get_submodule(inside)


def compiled_in_place(model: nn.Module) -> nn.Module:
    """Return a model with its compiled modules in the place of their wrappers by torch.compile.

    Those would be in the names of its tensors, and DeepSpeed's stage 3 cannot prepare them.
    """
    found = _compiled_inside(model)
    for module in [*found.modules()]:
        for name, child in module._modules.items():
            if child is not None:
                module._modules[name] = _compiled_inside(child)
    return found


def _compiled_inside(module: nn.Module) -> nn.Module:
    if type(module).__name__ != "OptimizedModule":  # by its name, as importing the class imports the compiler
        return module
    inner = module.get_submodule("_orig_mod")
    inner._compiled_call_impl = module.dynamo_ctx(inner._call_impl)  # type: ignore[operator]
    return inner
