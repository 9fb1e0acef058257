"""Building a model without its weights, and finding a model's folder."""

import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.core_model_loading import build_glob_alternation
from transformers.initialization import no_init_weights
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

from osft import storage
from osft.models.packed_attention import AttentionShape, use_kernel
from osft.process.private_names import dtype_plan
from osft.process.vector_math import settle_vector_math
from osft.storage.atomic import atomic_path
from osft.storage.paths import expanded

settle_vector_math()

_DROPOUT = re.compile(r"dropout|_pdrop$|^layerdrop$")
"""The settings of a model's config that are probabilities of dropping activations or layers."""


def model_folder(model: str, *, weights: bool = True) -> Path:
    """The local folder of `model`: a folder, a URI, or a Hugging Face id (`org/name` or `org/name@revision`).

    What is elsewhere is downloaded once; an id to the Hugging Face cache, without its weights if those are not
    wanted. Raises FileNotFoundError if there is no such folder and the hub has no such model or cannot be reached.
    """
    model = expanded(model)
    if storage.is_remote(model) or Path(model).is_dir():
        return storage.fetch(model, wanted=lambda name: weights or not name.endswith(".safetensors"))
    return _from_hub(model, None, weights=weights)


def stored_model(model: str, cache: str | Path) -> str:
    """The path or URI of `model`: itself, or for a Hugging Face id the folder below `cache` that it is kept in.

    Raises FileNotFoundError as `model_folder`.
    """
    model = expanded(model)
    if storage.is_remote(model) or Path(model).is_dir():
        return model
    address = storage.join(cache, model.replace("/", "--"))
    if storage.find(address, marker="config.json") is None:
        with atomic_path(storage.local(address)) as temporary:
            _from_hub(model, temporary)
        storage.publish(address, marker="config.json")
    return address


def _from_hub(model: str, folder: Path | None, *, weights: bool = True) -> Path:
    """Download a model to `folder`, or to the Hugging Face cache."""
    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise FileNotFoundError(
            f"model folder {model} does not exist. Give a local folder or a Hugging Face id (org/name)"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    name, _, revision = model.partition("@")
    files = ["*.json", "*.jinja", "*.model", "*.txt", *(["*.safetensors"] if weights else [])]
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=files, local_dir=folder))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
        raise FileNotFoundError(
            f"{model} is neither a local folder nor a model that could be downloaded{offline}: {error}. "
            "Without access to the hub, download the model elsewhere and give the path of its folder"
        ) from error


ROOM_FOR_WEIGHTS = 0.85
"""Share of a GPU's free memory; the rest is for activations and logits."""


class UnsupportedModelError(ValueError):
    """A model that cannot be trained as a causal language model, and why, in a line."""


def auto_class(config: PreTrainedConfig) -> Any:
    """The class of `transformers` that builds a model as its checkpoint was saved.

    Of a model that also sees or hears, it is the whole model. Raises UnsupportedModelError for an encoder-decoder and
    for what transformers knows neither as a causal nor as a multimodal language model.
    """
    kinds = (
        (AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
        (AutoModelForMultimodalLM, MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES),
    )
    architectures = config.architectures or []
    if not config.is_encoder_decoder:
        for auto, names in kinds:  # where both know the configuration, the checkpoint says which it is
            if names.get(config.model_type) in architectures or auto.__name__ in getattr(config, "auto_map", {}):
                return auto
        for auto, names in kinds:
            if config.model_type in names:
                return auto
        if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:  # registered by the user's own code
            return AutoModelForCausalLM
    what = "an encoder-decoder" if config.is_encoder_decoder else "no language model that transformers can build"
    raise UnsupportedModelError(
        f"{config.name_or_path or 'the model'} ({', '.join(architectures) or config.model_type}) is {what}. Give a "
        "model that continues text: one that AutoModelForCausalLM or AutoModelForMultimodalLM opens"
    )


def load_model(
    model_path: str | Path,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    attention: Sequence[AttentionShape] = (),
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The model of a folder with its weights, in evaluation mode. Raises UnsupportedModelError as `auto_class`.

    attention: what its layers ask of a kernel for packed samples, which then computes them on a GPU
    (`osft.models.packed_attention.use_kernel`).
    device "cuda": spread by blocks over all GPUs that the process sees, read straight to them. What has no room there
    stays in the CPU's memory, from where a block is copied while it computes. Inputs are given on the first GPU, and
    logits come there. Not yet run on several GPUs.
    """
    config = AutoConfig.from_pretrained(model_path, trust_remote_code=trust_remote_code)
    where: dict[str, Any] = {}
    if torch.device(device).type == "cuda":
        gpus = range(torch.cuda.device_count())
        room: dict[int | str, int] = {gpu: int(ROOM_FOR_WEIGHTS * torch.cuda.mem_get_info(gpu)[0]) for gpu in gpus}
        room["cpu"] = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        where = {"device_map": "auto", "max_memory": room}
    model: PreTrainedModel = auto_class(config).from_pretrained(
        model_path, dtype=dtype, trust_remote_code=trust_remote_code, **where
    )
    use_kernel(model, attention, torch.device(device))
    used: list[int | str] = list(getattr(model, "hf_device_map", {}).values())
    head = model.get_output_embeddings()
    if len(set(used)) > 1 and head is not None:  # whoever takes some positions of its inputs knows them there
        first = torch.device("cuda", next(device for device in used if isinstance(device, int)))
        head.register_forward_pre_hook(lambda _, inputs: (inputs[0].to(first), *inputs[1:]))
    return model.eval()


def without_dropout(config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration with nothing dropped, changed in place."""
    for part in (config, config.get_text_config()):
        for name, value in part.to_dict().items():
            if _DROPOUT.search(name) and isinstance(value, float):
                setattr(part, name, 0.0)
    return config


class _LargeOnMeta(TorchFunctionMode):
    """What is allocated for a weight of a real model is not allocated; what is computed is."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result_on = dict(kwargs or {})
        if func is torch.empty:
            sizes = args[0] if args and not isinstance(args[0], int) else result_on.get("size", args)
            if math.prod(sizes) >= _LARGE:
                result_on["device"] = "meta"
        return func(*args, **result_on)


_LARGE = 2**20
"""Elements."""


def empty_model(
    model_path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str | None = None,
    max_mlp_width: int | None = None,
    max_window: int | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The model of a folder with its parameters on the meta device and its buffers computed.

    It costs no memory beyond the buffers. `max_mlp_width` and `max_window`: MLPs with more `intermediate_size` get that
    much, and attention with a larger `sliding_window`, for who asks what the model's code does.
    `attn_implementation` None is SDPA, or "eager" for an architecture that does not support it (Gemma 2, gpt-oss).
    Dropout is off: with it, the loss would depend on how samples are packed and spread over processes.

    Raises FileNotFoundError if there is no config.json, ValueError if the architecture lacks `attn_implementation`,
    and UnsupportedModelError for what is no causal language model or needs a package that is not installed.
    """
    if not (Path(model_path) / "config.json").is_file():
        raise FileNotFoundError(f"{model_path} is not a model folder: it has no config.json")
    config = without_dropout(AutoConfig.from_pretrained(model_path, trust_remote_code=trust_remote_code))
    text_config = config.get_text_config()
    for name, largest in (("intermediate_size", max_mlp_width), ("sliding_window", max_window)):
        value = getattr(text_config, name, None)
        if largest and isinstance(value, int) and value > largest:
            setattr(text_config, name, largest)
    build = auto_class(config).from_config
    try:
        with no_init_weights(), _LargeOnMeta():
            model: PreTrainedModel = build(
                config, dtype=dtype, attn_implementation=attn_implementation, trust_remote_code=trust_remote_code
            )
    except ImportError as error:
        raise UnsupportedModelError(f"{model_path} cannot be built: {' '.join(str(error).split())}") from error
    model.tie_weights()  # part of the initialization that was left out
    emptied: dict[int, nn.Parameter] = {}  # tied parameters stay one
    for module in model.modules():
        for name, parameter in [*module.named_parameters(recurse=False, remove_duplicate=False)]:
            if id(parameter) not in emptied:
                emptied[id(parameter)] = nn.Parameter(parameter.to("meta"), requires_grad=False)
            module.register_parameter(name, emptied[id(parameter)])
    # As `from_pretrained` does: what the architecture wants in float32 whatever the dtype of the rest.
    if plan := dtype_plan(model, dtype):
        pattern, _, _ = build_glob_alternation(list(plan))
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if pattern.search(name):
                tensor.data = tensor.data.float()
    return model
