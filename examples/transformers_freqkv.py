"""FreqKV in a causal language model of Hugging Face transformers: to read, generate and train.

    attach(model, FreqKVConfig(window=4096))
    model.generate(**inputs)                        # each call reads its text anew
    talk = Conversation(FreqKVConfig(window=4096))
    model.generate(**inputs, cache=talk)            # or goes on where the last call ended
    model.train()                                   # no cache: FreqKVAttention, with gradients
    detach(model)

(`cache` is called `past_key_values` before transformers 5.24.) A hook before each attention module
replaces cos and sin by 1 and 0, so that the host rotates nothing, and q and k arrive unrotated at
`attend`, which hands them to FreqKV with the host's own rotation. The model remembers no text: a
Conversation does, and travels through the host as its cache.
"""

import math
import sys
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    Cache,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from freqkv import FreqKVAttention, FreqKVCache, FreqKVConfig, Operator, Rotate, lowband

# Each is tried in tests/test_examples.py. In others FreqKV may go wrong: where a norm comes after
# the rotation (hunyuan), or query head h reads another kv head than h // (H / K).
FAMILIES = [
    "cohere", "gemma", "glm", "granite", "llama", "mistral", "mixtral",
    "olmo2", "phi3", "qwen2", "qwen3", "qwen3_moe", "smollm3",
]  # fmt: skip
ROPE_TYPES = ["default", "linear", "llama3", "yarn"]  # others change with the length of the text
CACHE = "cache" if hasattr(CausalLMOutputWithPast, "cache") else "past_key_values"

Call = tuple[tuple[Any, ...], dict[str, Any]]  # arguments by place and by name, as hooks have them


def attach(model: PreTrainedModel, config: FreqKVConfig, operator: Operator = lowband) -> None:
    """Make a model read, generate and train with FreqKV; ValueError for one that it cannot serve.

    Its weights and its saved config stay as they are.
    """
    check_model(model, config)
    attachment = Attachment(model, config, operator)
    AttentionInterface.register("freqkv", attend)
    model.set_attn_implementation("freqkv")
    model.generate = attachment.generate
    model.freqkv = attachment


def detach(model: PreTrainedModel) -> None:
    """Give a model its own attention back."""
    for handle in model.freqkv.handles:
        handle.remove()
    model.set_attn_implementation(model.freqkv.host_attention)
    del model.generate
    del model.freqkv


class Conversation(Cache):
    """What has been read so far: a FreqKVCache, with the methods that `generate` calls."""

    is_croppable = False  # not across a round of compression
    is_linear = (False,)  # a cache of attention: the host passes it no token twice

    def __init__(self, config: FreqKVConfig, operator: Operator = lowband) -> None:
        super().__init__(layers=[])
        self.freqkv = FreqKVCache(config, operator)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.freqkv.tokens_seen

    def reset(self) -> None:
        self.freqkv.reset()

    def crop(self, tokens_to_remove: int) -> None:  # below 0, as the host has it
        if tokens_to_remove != 0:
            self.freqkv.crop(tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.freqkv.reorder(beam_idx)

    batch_select_indices = reorder_cache

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.freqkv.reorder(torch.arange(self.freqkv.batch).repeat_interleave(repeats))

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise ValueError(f"{CACHE}: was a Conversation, must go to a model that is attached")


class Attachment:
    """FreqKV in one model: its hooks, and what they need."""

    def __init__(self, model: PreTrainedModel, config: FreqKVConfig, operator: Operator) -> None:
        self.model = model
        self.config = config
        self.operator = operator
        self.parallel = FreqKVAttention(config, operator)
        self.rope = HostRope(model.base_model, config.window)
        self.host_attention = model.config._attn_implementation
        decoder = model.base_model
        self.handles = [decoder.register_forward_pre_hook(self.begin_call, with_kwargs=True)]
        for layer in decoder.layers:
            handle = layer.self_attn.register_forward_pre_hook(self.unrotate, with_kwargs=True)
            self.handles.append(handle)

    def generate(self, inputs: Any = None, generation_config: Any = None, **kwargs: Any) -> Any:
        """The host's `generate`, with a new Conversation unless it is given one."""
        settings = generation_config or self.model.generation_config
        for name in ("assistant_model", "assistant_early_exit", "prompt_lookup_num_tokens"):
            if kwargs.get(name, getattr(settings, name, None)) is not None:
                raise ValueError(f"{name}: was given, must be None: a round cannot be taken back")
        cache = take_cache(kwargs)
        if cache is None and kwargs.get("use_cache", settings.use_cache) is not False:
            cache = Conversation(self.config, self.operator)
        if cache is not None:
            kwargs[CACHE] = cache
        return type(self.model).generate(self.model, inputs, generation_config, **kwargs)

    def begin_call(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """Before the first layer: begin a Conversation where one is wanted, and refuse the rest."""
        if decoder.config._attn_implementation != "freqkv":
            was = decoder.config._attn_implementation
            raise ValueError(f"attn_implementation: was {was!r}, must be 'freqkv' until detached")
        cache = take_cache(kwargs)
        use_cache = kwargs.get("use_cache")
        if use_cache is None:
            use_cache = decoder.config.use_cache and not decoder.training
        if cache is None and use_cache:
            cache = Conversation(self.config, self.operator)
        if cache is not None:
            self.check_cache(cache, use_cache)
        seen = 0 if cache is None else cache.get_seq_length()
        check_rows(kwargs.get("attention_mask"), kwargs.get("position_ids"), seen)
        return args, kwargs | {CACHE: cache, "use_cache": use_cache, "attention_mask": None}

    def check_cache(self, cache: Cache, use_cache: bool) -> None:
        """ValueError unless a call can go on with this cache."""
        if not isinstance(cache, Conversation):
            was = type(cache).__name__
            raise ValueError(f"{CACHE}: was a {was}, must be a Conversation, or None to begin one")
        if cache.freqkv.config != self.config or cache.freqkv.operator != self.operator:
            raise ValueError(
                f"{CACHE}: was of {cache.freqkv.config} and {cache.freqkv.operator.__name__}, "
                f"must be of {self.config} and {self.operator.__name__}, as the model is"
            )
        if not use_cache:
            raise ValueError(f"use_cache: was False, must be True to go on with a {CACHE}")
        if torch.is_grad_enabled():
            raise ValueError(
                "use_cache: was True with gradients, must be False, as it is after model.train(); "
                "to read with a cache, call the model under torch.no_grad()"
            )

    def unrotate(self, attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """Before an attention module: positions that rotate nothing, and what `attend` needs."""
        cos, _ = kwargs["position_embeddings"]  # [1, T, D], or fewer channels than D
        one = cos.new_ones(1, 1, cos.shape[-1])
        cache = kwargs[CACHE]
        new: dict[str, Any] = {"position_embeddings": (one, torch.zeros_like(one)), CACHE: None}
        new["form"] = self.parallel if cache is None else cache.freqkv
        has_positions = getattr(attention, "use_rope", True)  # SmolLM3 has layers without
        new["rope"] = self.rope if has_positions else leave_unrotated
        return args, kwargs | new


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    scaling: float,
    dropout: float,
    form: FreqKVAttention | FreqKVCache,
    rope: Rotate,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What the host calls for attention: q [B, H, T, D], k, v [B, K, T, D] to [B, T, H, D]."""
    if dropout > 0:
        raise ValueError(f"attention_dropout: was {dropout} in training, must be 0")
    factor = scaling * math.sqrt(query.shape[-1])  # FreqKV itself scales by 1 / sqrt(D)
    if not math.isclose(factor, 1):
        query = query * factor
    return form(module.layer_idx, query, key, value, rope).transpose(1, 2), None


class HostRope:
    """The host's rotation as FreqKV calls it, from tables with a row for each slot."""

    def __init__(self, decoder: nn.Module, slots: int) -> None:
        self.rotary = decoder.rotary_emb
        self.apply = sys.modules[type(decoder).__module__].apply_rotary_pos_emb
        self.slots = slots
        self.tables: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def __call__(self, x: Tensor, start: int, inverse: bool = False) -> Tensor:
        """Rotate x [B, heads, T, D] as slots start .. start+T-1, or undo it; keeps the dtype."""
        if x.device not in self.tables:
            with torch.inference_mode(False), torch.no_grad():
                positions = torch.arange(self.slots, device=x.device)[None]
                like = torch.zeros(1, device=x.device)  # for float32
                self.tables[x.device] = self.rotary(like, positions)  # [1, slots, D] each
        cos, sin = self.tables[x.device]
        stop = start + x.shape[2]
        cos = cos[:, start:stop]
        sin = sin[:, start:stop]
        if inverse:
            gain = cos.square() + sin.square()  # 1, or the square of YaRN's factor
            cos = cos / gain
            sin = -sin / gain
        rotated, _ = self.apply(x, x[:, :0], cos, sin)  # it wants keys beside queries: none
        return rotated.to(x.dtype)


def leave_unrotated(x: Tensor, start: int, inverse: bool = False) -> Tensor:
    """The rope of a layer without positions."""
    return x


def take_cache(kwargs: dict[str, Any]) -> Cache | None:
    """Remove the cache from the arguments of a call, by either of its names."""
    older = kwargs.pop("past_key_values", None)
    return kwargs.pop("cache", older)


# What is refused


def check_model(model: PreTrainedModel, config: FreqKVConfig) -> None:
    """ValueError, by the name of the option, for a model that FreqKV would compute wrongly."""
    if not isinstance(model, GenerationMixin):
        was = type(model).__name__
        raise ValueError(
            f"model: was a {was}, must be a model of transformers that can generate "
            "(inside one of peft: get_base_model())"
        )
    if hasattr(model, "freqkv"):
        raise ValueError("model: was attached already, must be detached first")
    for name in ("attn_logit_softcapping", "sliding_window"):
        value = getattr(model.config, name, None)
        if value is not None:
            raise ValueError(f"{name}: was {value}, must be None: FreqKV attends to every slot")
    family = model.config.model_type
    if family not in FAMILIES:
        raise ValueError(
            f"model_type: was {family!r}, must be one of {', '.join(FAMILIES)}: others may have "
            "attention sinks, a norm after the rotation, or another order of heads"
        )
    rope_type = model.base_model.rotary_emb.rope_type
    if rope_type not in ROPE_TYPES:
        raise ValueError(f"rope_type: was {rope_type!r}, must be one of {', '.join(ROPE_TYPES)}")
    most = model.config.max_position_embeddings
    if config.window > most:
        raise ValueError(f"window: was {config.window}, must be at most the model's {most}")


def check_rows(mask: Any, positions: Tensor | None, seen: int) -> None:
    """ValueError unless each row of the batch is one text that goes on after `seen` tokens."""
    if mask is not None and (mask.ndim != 2 or not mask.all()):
        raise ValueError(
            "attention_mask: had padding or a form of its own, must be all ones: "
            "the texts of a batch must be of one length"
        )
    if positions is not None:
        stop = seen + positions.shape[-1]
        if (positions != torch.arange(seen, stop, device=positions.device)).any():
            raise ValueError(
                f"position_ids: were others than {seen} to {stop - 1}, must go on from the tokens "
                "that were read, with one text a row"
            )
