"""`GeneralistModel`: OFA+ with its vocabulary and the plans of its tasks; one instruction in, an answer out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast, overload

import torch
from torch import Tensor

from ofakern.checkpoint.answering import answer_all, encode_sources, evaluating
from ofakern.checkpoint.denoise import is_motion, learnt_settings, motion_loss, within_positions
from ofakern.checkpoint.encoded_sets import save_encoded_sets, with_encoded_sets
from ofakern.checkpoint.files import load_module, read_json, save_module, write_folder, write_json
from ofakern.checkpoint.foreign import Account, read_foreign
from ofakern.checkpoint.image_tokenizer import IMAGE_CODES, check_window, codes_options
from ofakern.checkpoint.known_task import KnownTask, TaskLike
from ofakern.checkpoint.recipes import Recipes
from ofakern.checkpoint.requests import Answer, PreparedRequest, Recipe, Row, StreamPiece, requested
from ofakern.data.batch import PackedBatch
from ofakern.data.example import Encoder, PreprocessConfig, Split
from ofakern.data.readers import open_files
from ofakern.errors import (
    CheckpointError,
    DataError,
    OfakernError,
    OfakernRuntimeError,
    OfakernTypeError,
    OfakernValueError,
)
from ofakern.generate import GenerationConfig, SearchSession, SpecialTokens, TokenEvent
from ofakern.instruction import Modality
from ofakern.modality.adaptors import adaptor_config
from ofakern.modality.audio.adaptor import MEL_BINS, AudioFbankConfig, AudioFrameAdaptor
from ofakern.modality.audio.criterion import guided_attention, speech_loss
from ofakern.modality.image.adaptor import ImagePatchEmbedAdaptor, ImageResnetAdaptor, ImageVitAdaptor
from ofakern.modality.image.vqgan import VQGAN, VQGANConfig
from ofakern.modality.output import Output
from ofakern.modality.video.adaptor import VideoAdaptor
from ofakern.model import TIED_KEYS, Memory, OFAConfig, OFAPlus, SegmentWriter
from ofakern.nn.loss import LossSums, label_smoothed_cross_entropy
from ofakern.plan import Plan, build_plans
from ofakern.text import Tokenizer

__all__ = ["GeneralistModel"]

_FORMAT = "ofakern.generalist"
_VERSION = 1
_IMAGE_ADAPTORS = ("image_resnet", "image_vit", "image_patch_embed")
_WEIGHTS = "model.safetensors"
_IMAGE_TOKENIZER = "image_tokenizer.safetensors"


class GeneralistModel:
    """A generalist encoder-decoder that follows instructions.

    Args:
        config: the network; None: that of `size`. Its vocabulary size is set by the tokenizer.
        size: tiny (33M), medium (93M), base (180M), large (470M), huge (930M).
        tokenizer: text <-> vocabulary; None: one is trained on the texts of the tasks, in `Trainer.fit` or `for_tasks`.
        vocab_size, bins, phones: text ids, box bins and names of phones of a vocabulary that is trained; phones None:
            those in the PHONE columns of the tasks.
        preprocess: how rows become tensors; `image_size=` (side of the square images in pixels, 480) is short for it.
        image_tokenizer: between images and codes, for IMAGE targets (`load_image_tokenizer`); it is saved with the
            model and not trained.
        generation: defaults of `inference`. seed: of the first weights. backend: of every attention.
        overrides: single fields of the configuration (`dim=64`, `encoder_layers=2`, ...).

    Attributes:
        cuda_graphs: whether searches run their steps as CUDA graphs (docs/GPU.md); False until it is set.

    Raises:
        OfakernTypeError, OfakernValueError: a configuration that cannot be built. OfakernRuntimeError: the network or
            tokenizer is used before there is a vocabulary.
    """

    def __init__(
        self,
        config: OFAConfig | None = None,
        *,
        size: str = "tiny",
        tokenizer: Tokenizer | None = None,
        vocab_size: int = 8192,
        bins: int = 1000,
        phones: Sequence[str] | None = None,
        preprocess: PreprocessConfig | None = None,
        image_size: int | None = None,
        image_tokenizer: VQGAN | None = None,
        generation: GenerationConfig | None = None,
        seed: int | None = 0,
        backend: str = "auto",
        **overrides: Any,
    ) -> None:
        if config is not None and not isinstance(config, OFAConfig):
            raise OfakernTypeError(f"GeneralistModel: config must be an OFAConfig, got {type(config).__name__}")
        self.config = OFAConfig.from_size(size) if config is None else config
        self.config = dataclasses.replace(self.config, **overrides)
        self.preprocess = preprocess or self._default_preprocess(image_size)
        self.generation = generation or GenerationConfig()
        self.tasks: dict[str, KnownTask] = {}
        self._vocab_size, self._bins, self._seed, self._backend = vocab_size, bins, seed, backend
        self._phones = phones
        self.cuda_graphs = False
        self.image_tokenizer = None if image_tokenizer is None else image_tokenizer.eval()
        # Adaptors that nobody has chosen follow from the tasks, as the vocabulary does.
        self._adaptors_open = config is None and "adaptors" not in overrides
        self._tokenizer: Tokenizer | None = None
        self._network: OFAPlus | None = None
        self._recipes = Recipes()
        self._writers: dict[tuple[str, int], SegmentWriter] = {}
        if tokenizer is not None:
            self._build(tokenizer)

    @classmethod
    def from_size(cls, size: str, **kwargs: Any) -> GeneralistModel:
        """A fresh model of a published size; see the class for the other arguments."""
        return cls(size=size, **kwargs)

    @classmethod
    def for_tasks(cls, tasks: Sequence[TaskLike], **kwargs: Any) -> GeneralistModel:
        """A fresh model with a vocabulary trained on the tasks' texts, their plans known."""
        model = cls(**kwargs)
        model.prepare(tasks)
        return model

    def _default_preprocess(self, image_size: int | None) -> PreprocessConfig:
        longest = getattr(self.config.adaptor("text"), "max_position", 1024)
        base = PreprocessConfig(max_source_length=longest, max_target_length=longest)
        return base if image_size is None else dataclasses.replace(base, image_size=image_size)

    def _build(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.config = dataclasses.replace(self.config, vocab_size=len(tokenizer.vocabulary))
        self._network = OFAPlus(self.config, backend=self._backend, seed=self._seed).eval()
        self._writers.clear()
        tokens = _image_tokens(self._network, self.preprocess)
        self.preprocess = dataclasses.replace(
            self.preprocess,
            image_tokens={**tokens, **self.preprocess.image_tokens},
            motion=within_positions(self.preprocess.motion, self.config),
            **_audio_limits(self.config),
        )

    # -------------------------------------------------------------------------------------------------- the parts

    @property
    def network(self) -> OFAPlus:
        """The OFA+ network; OfakernRuntimeError before there is a vocabulary."""
        if self._network is None:
            raise OfakernRuntimeError(
                "GeneralistModel: a vocabulary must be there before the network, got none"
                "\nTry: GeneralistModel.for_tasks(tasks), Trainer(...).fit(model=, tasks=), or tokenizer="
            )
        return self._network

    @property
    def tokenizer(self) -> Tokenizer:
        """Text <-> vocabulary; OfakernRuntimeError before there is one."""
        if self._tokenizer is None:
            raise OfakernRuntimeError(
                "GeneralistModel: a vocabulary must be trained or given, got none"
                "\nTry: GeneralistModel.for_tasks(tasks)"
            )
        return self._tokenizer

    def __repr__(self) -> str:
        c = self.config
        size = f"dim={c.dim}, layers={c.encoder_layers}+{c.decoder_layers}"
        return f"GeneralistModel({size}, vocabulary={c.vocab_size}, tasks={sorted(self.tasks)})"

    def to(self, device: torch.device | str) -> GeneralistModel:
        """Move the network; returns self."""
        self.network.to(device)
        return self

    def quantize(self, kind: str | None) -> GeneralistModel:
        """Text, boxes and codes are written with rounded weights ("int8"; None: its own again): see `OFAPlus.quantize`
        for their error. Encoding, saving and training keep the model's own. Returns self."""
        self.network.quantize(kind)
        return self

    @property
    def _image_adaptor(self) -> str | None:
        names = [adaptor.name for adaptor in self.config.adaptors]
        return next((name for name in _IMAGE_ADAPTORS if name in names), None)

    def _check_plan(self, plan: Plan) -> Plan:
        plan.require_available()
        names = {adaptor.name for adaptor in self.config.adaptors}
        for segment in plan.segments:
            if segment.adaptor not in names:
                raise OfakernValueError(
                    f"GeneralistModel: adaptors must include {segment.adaptor!r} for {plan.instruction!r}, "
                    f"got {sorted(names)}\nTry: GeneralistModel(adaptors=(...)), or leave them open: they then follow "
                    "from the tasks"
                )
        if any(segment.adaptor == IMAGE_CODES for segment in plan.target):
            check_window(self.config, self.image_tokenizer)
        return plan

    # --------------------------------------------------------------------------------------------------- training

    def prepare(self, tasks: Sequence[TaskLike]) -> None:
        """Learn the tasks' plans; where there is no vocabulary yet, train one on their texts and build the network."""
        known = {task.name: KnownTask.from_task(task, self._image_adaptor) for task in tasks}
        if self._tokenizer is None and self._adaptors_open:
            self._add_adaptors(known.values())
        if not self.preprocess.motion.skeleton:
            motion = learnt_settings(self.preprocess.motion, tasks)
            self.preprocess = dataclasses.replace(self.preprocess, motion=motion)
        for task in known.values():
            for plan in task.plans:
                self._check_plan(plan)
        if self._tokenizer is None:
            # A task of phones alone has no texts; the names keep the text part of its vocabulary from being empty.
            texts = (text for task in tasks for text in (*task.texts(), *task.phones()))
            phones = sorted({p for task in tasks for p in task.phones()}) if self._phones is None else self._phones
            codes = 0 if self.image_tokenizer is None else self.image_tokenizer.config.codes
            self._build(Tokenizer.train(texts, self._vocab_size, codes=codes, bins=self._bins, phones=phones))
        self.tasks.update(known)

    def _add_adaptors(self, tasks: Iterable[KnownTask]) -> None:
        """With their defaults, the adaptors that the tasks' plans name and the configuration has not."""
        plans = [plan for task in tasks for plan in task.plans]
        for plan in plans:
            plan.require_available()
        wanted = {segment.adaptor for plan in plans for segment in plan.segments}
        missing = sorted(wanted - {adaptor.name for adaptor in self.config.adaptors})
        codes = codes_options(self.image_tokenizer)
        added = tuple(adaptor_config(name, codes if name == IMAGE_CODES else {}) for name in missing)
        self.config = dataclasses.replace(self.config, adaptors=(*self.config.adaptors, *added))

    def example_encoder(self, task: TaskLike, split: Split) -> Encoder:
        """Row -> Example for a split of a task that `prepare` has seen."""
        known = self.tasks[task.name]
        return Encoder(
            known.plans,
            self.tokenizer,
            self.preprocess,
            split=split,
            closed_sets=known.closed_sets(self.tokenizer),
            files=open_files(task.files),
            prepare=task.prepared,
            image_tokenizer=self.image_tokenizer,
        )

    def train_step_loss(self, batch: PackedBatch, label_smoothing: float = 0.0) -> LossSums:
        """The batch's summed loss (with a gradient), negative log-likelihood (of speech and motion: the loss) and
        token count."""
        if is_motion(batch.target):
            return motion_loss(self.network, batch)
        if batch.frames is not None:
            return self._speech_loss(batch, batch.frames)
        hidden = self.network(batch)
        return label_smoothed_cross_entropy(
            hidden, self.network.output_weight, batch.labels, label_smoothing, batch.allowed
        )

    def prepare_batch(self, batch: PackedBatch) -> bool:
        """Builds the batch's layouts where CUDA graphs can record `train_step_loss`: not for speech, whose loss goes by
        the lengths of single samples, for motions, whose noise is drawn on the host, and where activations are computed
        again, for which the generator's state is read."""
        if batch.frames is not None or is_motion(batch.target) or self.network.config.checkpoint_activations:
            return False
        self.network.prepare(batch, share_positions=False)
        return True

    def _speech_loss(self, batch: PackedBatch, frames: Tensor) -> LossSums:
        network = self.network
        writer = network.frame_adaptor(batch.target.segments[0].adaptor)
        assert isinstance(writer, AudioFrameAdaptor)
        config, guide = writer.config, None
        if config.guided_attention:
            hidden, attention = network.decode_with_attention(batch.target, network.encode(batch.source))
            guide = config.guided_attention * guided_attention(attention, config.guided_attention_sigma)
        else:
            hidden = network(batch)
        speech = writer.outputs(hidden, batch.target.lengths_cpu)
        return speech_loss(speech, frames, batch.labels, config.stop_weight, guide)

    # -------------------------------------------------------------------------------------------------- inference

    @overload
    def inference(self, instruction: str, data: Row | None = None, **kwargs: Any) -> Any: ...

    @overload
    def inference(self, instruction: str, data: Sequence[Row], **kwargs: Any) -> list[Any]: ...

    @overload
    def inference(self, instruction: Sequence[Any], data: Any = None, **kwargs: Any) -> list[Any]: ...

    def inference(
        self,
        instruction: str | Sequence[Any],
        data: Row | Sequence[Row] | None = None,
        *,
        closed_set: Iterable[str] | None = None,
        batch_size: int = 8,
        files: str | Path | None = None,
        stream: Callable[[StreamPiece], object] | None = None,
        **generation: Any,
    ) -> Any:
        """Follow an instruction, or that of a task the model knows by name; many of them together.

        Args:
            instruction: a task's name, or any instruction (its first alternative), new ones included. A list of them
                is followed in one batch, with one `data` each; so is a list of (instruction, row) pairs, or of
                (instruction, row, settings) with settings of `generation` for this row.
            data: the slots' values by name: one row, or a list of rows. Images are paths, PIL images or arrays.
                Answers in them are not looked at.
            closed_set: the only answers there are (a list, or a mapping whose keys they are).
            batch_size: most rows generated together. files: folder or .zip archive for file names.
            stream: is called with a `StreamPiece` for every token as soon as it is certain. What it raises is raised.
            generation: `GenerationConfig`'s settings, OFASys's names too (`beam_size=`, `max_len=`, ...).

        Returns:
            An `Output` (`.text`, `.box` in pixels of the original image, `.image`, `.values`, `.score`,
            `.token_log_probs`) for one row, a list in order for a list; with `num_return_sequences` above 1 every
            `Output` is a list, best first. A row's answer does not depend on what it is generated together with.

        Raises:
            InstructionError: what the instruction is wrong about. DataError: a row that cannot be used.
            OfakernRuntimeError: a slot's modality is not available yet. OfakernValueError: an unknown task or setting,
            or an adaptor that this model was built without.
        """
        single = isinstance(instruction, str) and (data is None or isinstance(data, Mapping))
        if batch_size < 1:
            raise OfakernValueError(f"inference: batch_size must be at least 1, got {batch_size}")
        closed = None if closed_set is None else tuple(map(str, closed_set))
        asked, recipes = [], {}
        for one, row, own in requested(instruction, data):
            if one not in recipes:
                recipes[one] = self._recipes.get(self, one, self._known(one), closed, files)
            known = recipes[one].known
            asked.append((recipes[one], row, self._generation(known, known.generation, {**generation, **own})))
        found = self._answered(asked, batch_size, stream)
        return found[0] if single else found

    __call__ = inference

    def answers(self, task: TaskLike, rows: Sequence[Row]) -> list[Output]:
        """The best answer for each of a task's (prepared) rows."""
        known = self.tasks[task.name]
        config = self._generation(known, task.generation, {"num_return_sequences": 1})
        recipe = self._recipes.get(self, task.name, known, None, task.files)
        found = self._answered([(recipe, row, config) for row in rows], task.micro_batch_size, None)
        return [cast(Output, answer) for answer in found]

    def _answered(
        self,
        asked: Sequence[tuple[Recipe, Row, GenerationConfig]],
        batch_size: int,
        stream: Callable[[StreamPiece], object] | None,
    ) -> list[Answer]:
        prepared = (recipe.prepare(row, n, config, tell=stream) for n, (recipe, row, config) in enumerate(asked))
        in_batches = any(config.compat for _, _, config in asked)
        return answer_all(self, prepared, batch_size, in_batches=in_batches)

    def prepare_request(
        self,
        instruction: str,
        row: Row,
        *,
        closed_set: Iterable[str] | None = None,
        files: str | Path | None = None,
        number: int = 0,
        keep_images: bool = True,
        on_token: Callable[[TokenEvent], object] | None = None,
        stream: bool = False,
        **generation: Any,
    ) -> PreparedRequest:
        """One row made ready for a `SearchSession` (`prepared.search`) or `run_request`; `inference` has the arguments.

        number: names the row in errors. keep_images: an answer's `.image` is the row's. May be called from several
        threads.
        """
        known = self._known(instruction)
        closed = None if closed_set is None else tuple(map(str, closed_set))
        recipe = self._recipes.get(self, instruction, known, closed, files)
        config = self._generation(known, known.generation, generation)
        return recipe.prepare(row, number, config, on_token, stream=stream, keep_images=keep_images)

    def encode_requests(self, prepared: Sequence[PreparedRequest]) -> Memory:
        """The memory that `SearchSession.add` takes for requests with one `writer_key`."""
        with evaluating(self.network):
            return encode_sources(self.network, prepared)

    def search_session(self, writer_key: tuple[str, int] = ("text", int(Modality.TEXT))) -> SearchSession:
        """A session for prepared requests; `add(..., model=self.writer(key))` takes those with another key."""
        return SearchSession(self.writer(writer_key), self.special_tokens, cuda_graphs=self.cuda_graphs)

    @property
    def special_tokens(self) -> SpecialTokens:
        """Their ids in this model's vocabulary."""
        vocabulary = self.tokenizer.vocabulary
        return SpecialTokens(vocabulary.bos, vocabulary.pad, vocabulary.eos, vocabulary.unk)

    def writer(self, key: tuple[str, int]) -> SegmentWriter:
        """What writes targets of this adaptor and modality (`PreparedRequest.writer_key`); the same one every time."""
        adaptor, modality = key
        if not self.config.modal_ffn:
            modality = int(Modality.TEXT)  # only experts by modality tell them apart
        writer = self._writers.get((adaptor, modality))
        if writer is None:
            writer = self._writers[adaptor, modality] = SegmentWriter(self.network, adaptor, modality)
        return writer

    def run_request(self, prepared: PreparedRequest) -> Answer:
        """The answer of one request, of any kind, by itself."""
        return answer_all(self, [prepared], 1)[0]

    def plan_for(self, instruction: str) -> Plan:
        """The plan that inference follows for a task's name or an instruction."""
        return self._known(instruction).plans[0]

    def _generation(self, known: KnownTask, task: Mapping[str, Any], asked: Mapping[str, Any]) -> GenerationConfig:
        """The settings of an answer; speech may take all the model's positions unless it is asked for less, codes of an
        image are drawn unless beams are asked for."""
        if known.plans[0].target[-1].modality is Modality.IMAGE and not {"num_beams", "beam", "beam_size"} & set(asked):
            asked = {"do_sample": True, **asked}
        config = self.generation
        if known.plans[0].target[-1].modality is Modality.AUDIO:
            config = config.replace(max_new_tokens=self.preprocess.audio_tokens)
        # One after the other: the task may say max_len where the call says max_new_tokens.
        return config.replace(**task).replace(**asked)

    def _known(self, instruction: str) -> KnownTask:
        if instruction in self.tasks:
            return self.tasks[instruction]
        same = next((known for known in self.tasks.values() if known.instruction == instruction), None)
        if same is not None:
            return same
        if "->" not in instruction and instruction.isidentifier():
            raise OfakernValueError(
                f"inference: instruction must be one, or the name of a known task ({', '.join(sorted(self.tasks))}), "
                f"got {instruction!r}"
            )
        plans = build_plans(instruction, default_image_adaptor=self._image_adaptor)
        return KnownTask(instruction, tuple(self._check_plan(plan) for plan in plans))

    # ------------------------------------------------------------------------------------------------------ files

    def save_pretrained(self, directory: str | Path) -> None:
        """Write weights, configuration, vocabulary, plans and generation settings; a reader never sees half of it."""
        network, tokenizer = self.network, self.tokenizer

        def write(folder: Path) -> None:
            save_module(folder / _WEIGHTS, network, TIED_KEYS)
            tokenizer.save_pretrained(folder)
            header = {"format": _FORMAT, "version": _VERSION}
            parts = {"model": self.config.to_dict(), "preprocess": dataclasses.asdict(self.preprocess)}
            if self.image_tokenizer is not None:
                save_module(folder / _IMAGE_TOKENIZER, self.image_tokenizer, {})
                parts["image_tokenizer"] = self.image_tokenizer.config.to_dict()
            write_json(folder / "config.json", {**header, **parts})
            tasks = {name: task.to_dict() for name, task in self.tasks.items()}
            write_json(folder / "plans.json", {**header, "tasks": tasks})
            save_encoded_sets(folder, self.tasks, tokenizer)
            write_json(folder / "generation_config.json", self.generation.to_dict())

        write_folder(directory, write)

    def load_weights(self, directory: str | Path) -> None:
        """Load the weights that `save_pretrained` wrote; CheckpointError names keys that do not fit."""
        load_module(Path(directory) / _WEIGHTS, self.network, TIED_KEYS)

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        *,
        device: torch.device | str | None = None,
        backend: str = "auto",
        bpe: str | Path | None = None,
        tokenizer: Tokenizer | None = None,
        compat: str = "",
    ) -> GeneralistModel:
        """The model that `save_pretrained` or another system wrote, with the same outputs.

        directory: a saved model, a checkpoint of a training run, or the run's output_dir (its newest checkpoint); or a
            checkpoint of OFASys or OFA. `bpe`, `tokenizer`, `compat`: see `read_foreign`; for those only.
        Raises CheckpointError, which says what is damaged or does not fit.
        """
        folder = _newest(Path(directory))
        if folder.is_file():
            return cls.from_foreign(
                folder, device=device, backend=backend, bpe=bpe, tokenizer=tokenizer, compat=compat
            )[0]
        if not folder.is_dir():
            raise CheckpointError(f"from_pretrained: directory must be a saved model, got {str(folder)!r}")
        data = read_json(folder / "config.json")
        if data.get("model_type") == "ofa":
            return cls.from_foreign(
                folder, device=device, backend=backend, bpe=bpe, tokenizer=tokenizer, compat=compat
            )[0]
        if data.get("format") != _FORMAT or data.get("version") != _VERSION:
            raise CheckpointError(
                f"from_pretrained: {folder / 'config.json'} must be {_FORMAT} {_VERSION}, "
                f"got {data.get('format')} {data.get('version')}"
            )
        try:
            tokenizer = Tokenizer.from_pretrained(folder)
            config = OFAConfig.from_dict(data["model"])
            preprocess = PreprocessConfig(**{k: _tupled(v) for k, v in data["preprocess"].items()})
            generation = GenerationConfig.from_dict(read_json(folder / "generation_config.json"))
            shape = data.get("image_tokenizer")
            image_tokenizer = None if shape is None else VQGAN(VQGANConfig.from_dict(shape))
        except (DataError, OfakernValueError, OfakernTypeError, KeyError, TypeError) as error:
            raise CheckpointError(f"from_pretrained: {folder} must hold a whole model, got: {error}") from error
        if config.vocab_size != len(tokenizer.vocabulary):
            raise CheckpointError(
                f"from_pretrained: vocabulary must have the model's size ({config.vocab_size}), "
                f"got {len(tokenizer.vocabulary)}"
            )
        if image_tokenizer is not None:
            load_module(folder / _IMAGE_TOKENIZER, image_tokenizer, {})
        model = cls(
            config,
            tokenizer=tokenizer,
            preprocess=preprocess,
            image_tokenizer=image_tokenizer,
            generation=generation,
            backend=backend,
        )
        plans = read_json(folder / "plans.json").get("tasks")
        if not isinstance(plans, dict):
            raise CheckpointError(
                f"from_pretrained: {folder / 'plans.json'} must hold tasks, got {type(plans).__name__}"
            )
        tasks = {name: KnownTask.from_dict(task) for name, task in plans.items()}
        model.tasks = with_encoded_sets(folder, tasks, model.tokenizer)
        model.load_weights(folder)
        return model if device is None else model.to(device)

    @classmethod
    def from_foreign(
        cls,
        path: str | Path,
        *,
        device: torch.device | str | None = None,
        backend: str = "auto",
        bpe: str | Path | None = None,
        tokenizer: Tokenizer | None = None,
        compat: str = "",
    ) -> tuple[GeneralistModel, Account]:
        """A model from another system's checkpoint, and the account of its keys (`read_foreign` has the arguments)."""
        foreign = read_foreign(Path(path), bpe=bpe, tokenizer=tokenizer, compat=compat)
        model = cls(foreign.config, backend=backend)
        model.preprocess = dataclasses.replace(model.preprocess, **foreign.preprocess)
        model._build(foreign.tokenizer)  # with the preprocessing known: it counts an image's tokens
        ledger = foreign.load(model.network)
        for name, template in foreign.tasks.items():
            try:
                model.tasks[name] = model._known(template)
            except OfakernError as error:
                foreign.notes.append(f"task {name} is left out: {str(error).splitlines()[0]}")
        account = Account(ledger, tuple(foreign.notes))
        return (model if device is None else model.to(device)), account


def _newest(folder: Path) -> Path:
    """The newest checkpoint of a run's folder, or the folder itself when it is none."""
    if (folder / "config.json").exists():
        return folder
    return max(folder.glob("checkpoint-" + "[0-9]" * 8), default=folder)


def _tupled(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _audio_limits(config: OFAConfig) -> dict[str, Any]:
    """What preprocessing takes from the audio adaptors: the fewest positions, the common frames per step."""
    found = [adaptor for adaptor in config.adaptors if isinstance(adaptor, AudioFbankConfig)]
    if not found:
        return {}
    steps = {adaptor.n_frames_per_step for adaptor in found}
    if len(steps) > 1 or any(adaptor.output_frame_dim != MEL_BINS for adaptor in found):
        raise OfakernValueError(
            f"GeneralistModel: audio adaptors must have {MEL_BINS} mel bins and one n_frames_per_step, got {found}"
        )
    return {"audio_tokens": min(adaptor.max_position for adaptor in found), "frames_per_step": steps.pop()}


def _image_tokens(network: OFAPlus, preprocess: PreprocessConfig) -> dict[str, int]:
    """Tokens an image, or a frame of a video, takes, by adaptor."""
    found: dict[str, int] = {}
    for name, adaptor in network.encoder.adaptor.adaptors.items():
        if isinstance(adaptor, (ImageResnetAdaptor, ImageVitAdaptor)):
            height, width = adaptor.grid(preprocess.image_size, preprocess.image_size)
            found[name] = height * width
        elif isinstance(adaptor, VideoAdaptor):
            height, width = adaptor.images.grid(preprocess.video_size, preprocess.video_size)
            found[name] = height * width
        elif isinstance(adaptor, ImagePatchEmbedAdaptor):
            found[name] = adaptor.tokens
    return found
