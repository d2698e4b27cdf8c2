"""What determines a run: the recipe.

A recipe is plain, frozen, complete data. It is read from TOML, overridden field by field, checked as a whole, and
written back complete; together with an image set and a machine it determines every weight. Unknown fields and
values are errors that name the nearest known one. Imports neither torch nor numpy.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin

import pydantic
import tomli_w
from pydantic import Field

from fromzero.errors import InputError, checking_types, nearest
from fromzero.shipped import names_of, text_of

Padding = Literal["same", "valid"]
Rate = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1, le=1_000_000)]


def _types_in(annotation: Any) -> set[Any]:
    """All types that a field's type is made of."""
    if get_origin(annotation) is Annotated:
        return _types_in(get_args(annotation)[0])
    return {annotation}.union(*map(_types_in, get_args(annotation)))


def _truth_value_in(value: Any) -> bool | None:
    """The first True or False in `value` or in the lists in it, or None."""
    if isinstance(value, list | tuple):
        return next((found for each in value if (found := _truth_value_in(each)) is not None), None)
    return value if isinstance(value, bool) else None


class _Part(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True)

    @pydantic.field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, given: Any, info: pydantic.ValidationInfo) -> Any:
        """Refuse `epochs = true`, which pydantic would read as 1."""
        types = _types_in(cls.model_fields[info.field_name or ""].annotation)
        if types & {int, float} and bool not in types and (found := _truth_value_in(given)) is not None:
            raise ValueError(f"{str(found).lower()} is not a number")
        return given


class Block(NamedTuple):
    """One block of a network, with every rate and size spelled out: convolutions, with pooling, then dropout."""

    channels: tuple[int, ...]
    padding: Padding
    pool: int
    dropout: float
    activation_layers: bool


class NetworkRecipe(_Part):
    """A convolutional network as data: perhaps a whitening layer, blocks of 3×3 convolutions, a head that turns the
    last map into features, hidden dense layers, one output a class. A field that takes one value a block (or a hidden
    dense layer) also takes one value for all of them.

    Sources: batch normalisation, Ioffe and Szegedy (2015); residual connections, He et al. (2016); whitening layer,
    Coates and Ng (2012), as a fixed first layer Page (2019) and Jordan, "94% on CIFAR-10 in 3.29 Seconds on a Single
    GPU" (2024, arXiv:2404.00498), from which also come pooling behind the first convolution, batch normalisation
    without a scale, and filters that start as the identity; GELU, Hendrycks and Gimpel (2016)."""

    channels: tuple[tuple[Count, ...], ...] = Field(
        min_length=1, description="channels of the 3×3 convolutions, one list a block: [[32, 64], [128]]"
    )
    padding: Padding | tuple[Padding, ...] = Field("same", description="same or valid, for every block or one a block")
    pool: Count | tuple[Count, ...] = Field(
        2,
        description="max pooling at the end of a block (window and stride; 1 is none), for all or one a block",
    )
    block_dropout: Rate | tuple[Rate, ...] = Field(
        0.0, description="dropout rate after each block, for all or one a block"
    )
    pool_after: Literal["last", "first"] = Field(
        "last", description="the convolution of a block that its pooling follows: last or first"
    )
    activation: Literal["relu", "gelu"] = Field("relu", description="relu or gelu, after every hidden layer")
    batch_norm: bool = Field(
        False,
        description="batch normalisation after every convolution (a trained shift, no scale); they then have no bias",
    )
    residual: bool = Field(False, description="add the output of a block's first convolution to that of its last")
    whitening: int = Field(
        0,
        ge=0,
        le=4,
        description="side of a fixed first convolution that whitens the patches of the train images; 0 is none",
    )
    whitening_directions: int = Field(
        0,
        ge=0,
        le=1_000_000,
        description="principal directions of the patches that it keeps, those of the largest variance; each gives two"
        " filters, of either sign; 0: all",
    )
    whitening_padding: Padding = Field(
        "valid", description="valid, or same: the whitened map is as large as the image (zeros around it)"
    )
    initial: Literal["glorot", "dirac"] = Field(
        "glorot", description="first weights: glorot, as in Keras; dirac, filters that start as the identity"
    )
    head: Literal["flatten", "max", "mean"] = Field(
        "flatten", description="the last map as features: all of it, or each channel's max or mean"
    )
    logit_scale: float = Field(1.0, gt=0, le=1e6, description="factor on the outputs")
    dense: tuple[Count, ...] = Field((64,), description="units of the hidden dense layers: [1024, 1024]")
    dense_dropout: Rate | tuple[Rate, ...] = Field(
        0.0, description="dropout rate after each hidden dense layer, for all or one a layer"
    )
    dropout_from_epoch: float = Field(0.0, ge=0, description="epochs after which dropout is switched on")
    activation_layers: bool | tuple[bool, ...] = Field(
        True,
        description="whether `summary` lists a block's ReLU as a layer of its own; the function is the same",
    )
    dense_activation_layers: bool = Field(
        True, description="whether `summary` lists the ReLU of dense layers as layers of their own"
    )

    def blocks(self) -> tuple[Block, ...]:
        """The blocks in order, single values spread over all of them."""
        n = len(self.channels)
        columns = (self.padding, self.pool, self.block_dropout, self.activation_layers)
        spread = [value if isinstance(value, tuple) else (value,) * n for value in columns]
        return tuple(Block(*row) for row in zip(self.channels, *spread, strict=True))

    def dense_layers(self) -> tuple[tuple[int, float], ...]:
        """(units, dropout rate) of each hidden dense layer."""
        rates = self.dense_dropout
        return tuple(zip(self.dense, rates if isinstance(rates, tuple) else (rates,) * len(self.dense), strict=True))

    @pydantic.model_validator(mode="after")
    def _lengths_agree(self) -> NetworkRecipe:
        for field, of, n in (
            ("padding", "channels", len(self.channels)),
            ("pool", "channels", len(self.channels)),
            ("block_dropout", "channels", len(self.channels)),
            ("activation_layers", "channels", len(self.channels)),
            ("dense_dropout", "dense", len(self.dense)),
        ):
            value = getattr(self, field)
            if isinstance(value, tuple) and len(value) != n:
                raise ValueError(f"{field} has {len(value)} values where {of} has {n}")
        if any(not block for block in self.channels):
            raise ValueError("channels has a block without a convolution")
        for block in self.blocks() if self.residual else ():
            if len(block.channels) > 1 and (len(set(block.channels)) > 1 or block.padding != "same"):
                raise ValueError("residual adds maps of one shape: same padding, and as many channels within a block")
        return self


class AugmentRecipe(_Part):
    """What is done to a train image before a step, anew each time; images that are scored stay as they are.

    Sources: alternating flips, Jordan (2024, arXiv:2404.00498); rotation, Simard et al. (2003); colours, Howard (2013,
    arXiv:1312.5402); cutout, DeVries and Taylor (2017); cutmix, Yun et al. (2019, arXiv:1905.04899); smaller images
    first, Tan and Le (2021, arXiv:2104.00298)."""

    flip: Literal["none", "random", "alternating"] = Field(
        "none",
        description="mirroring: none, random, or alternating: a random half of the images in the first epoch, the other"
        " half in the next, and so on",
    )
    translate: int = Field(
        0, ge=0, le=1000, description="shift by up to so many pixels each way, the border filled by reflection"
    )
    crop: int = Field(
        0, ge=0, le=10_000, description="side in pixels of a part cut out at random to train on; 0 is the whole image"
    )
    scale: float = Field(1.0, gt=0, le=1, description="factor on the sides of train images in the first `scale_epochs`")
    scale_epochs: float = Field(0.0, ge=0, description="epochs, from the first, on smaller images; 0: none")
    rotate: float = Field(
        0.0, ge=0, le=180, description="turn by up to so many degrees each way, corners filled by reflection"
    )
    colour: float = Field(
        0.0,
        ge=0,
        le=1,
        description="how far brightness, contrast and saturation of an image are changed, each by a random factor from"
        " 1 less this to 1 plus this",
    )
    cutout: int = Field(
        0, ge=0, le=10_000, description="side in pixels of a square set to zero, after scaling; 0 is none"
    )
    cutmix: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of a step's images in which a rectangle of random size is replaced by that part of another"
        " image; labels are mixed by area, and running accuracy uses the label of the larger part",
    )

    @property
    def scales(self) -> bool:
        """Whether images are ever made smaller."""
        return self.scale < 1 and self.scale_epochs > 0


class OptimizerRecipe(_Part):
    """Which optimizer, and its constants. Fields that an optimizer does not use are ignored by it.

    muon: orthogonalised momentum for the filters and hidden dense weights (Jordan et al., 2024), sgd with Nesterov's
    momentum for all others."""

    name: Literal["sgd", "adam", "adamw", "muon"] = Field("adam", description="sgd, adam, adamw or muon")
    learning_rate: float = Field(1e-3, gt=0, description="peak learning rate")
    head_learning_rate: float = Field(
        0.0, ge=0, description="peak learning rate of the output layer's weights; 0: that of all others"
    )
    bias_learning_rate: float = Field(
        0.0, ge=0, description="peak learning rate of biases and batch normalisation; 0: that of all others"
    )
    momentum: float = Field(0.9, ge=0, lt=1, description="momentum of sgd, and of what muon leaves to it")
    muon_momentum: float = Field(0.6, ge=0, lt=1, description="momentum of muon")
    nesterov: bool = Field(False, description="Nesterov's momentum, for sgd")
    beta1: float = Field(0.9, ge=0, lt=1, description="decay of the first moment, for adam and adamw")
    beta2: float = Field(0.999, ge=0, lt=1, description="decay of the second moment, for adam and adamw")
    epsilon: float = Field(
        1e-7, ge=1e-30, le=1e6, description="added to the root of the second moment (1e-7 as in Keras)"
    )
    weight_decay: float = Field(
        0.0, ge=0, le=1e6, description="added to the gradient (sgd, adam, what muon leaves to sgd) or decoupled (adamw)"
    )


class ScheduleRecipe(_Part):
    """The learning rate over the run, as a fraction of its peak: a linear warm-up, then `name`."""

    name: Literal["constant", "linear", "cosine", "cooldown"] = Field(
        "constant",
        description="constant; linear or cosine: falls towards zero over the whole run; cooldown: constant, then falls"
        " linearly towards zero over the last fifth of the steps after the warm-up (Hägele et al., 2024)",
    )
    warmup_epochs: float = Field(0.0, ge=0, le=100_000, description="epochs of linear warm-up from zero")


class ValidationRecipe(_Part):
    """Which images the validation figures come from."""

    source: Literal["split", "test", "fold"] = Field(
        "split",
        description="split: the data set's own, or a stratified part of the train images; test: the test images; fold:"
        " one of several such parts, which fromzero cross-validate holds out in turn",
    )
    fraction: float = Field(0.1, gt=0, lt=1, description="share of each class that `split` holds out")
    folds: int = Field(5, ge=2, le=1000, description="how many parts `fold` makes of the train images")
    fold: int = Field(1, ge=1, description="which of them it holds out, from 1")

    @pydantic.model_validator(mode="after")
    def _is_one_of_them(self) -> ValidationRecipe:
        if self.fold > self.folds:
            raise ValueError(f"fold {self.fold} is not one of {self.folds} folds: they are numbered from 1")
        return self


class Recipe(_Part):
    """Everything that determines a run, apart from the images and the machine."""

    name: str = Field("custom", min_length=1, description="what the recipe is called")
    dataset: str = Field("cifar10", min_length=1, description="cifar10, digits, a folder of pictures, or CIFAR's files")
    seed: int = Field(0, ge=0, description="seed of weights, order, augmentation and dropout")
    epochs: int = Field(10, ge=1, le=1_000_000, description="passes over the train images; see skip_easy")
    batch_size: int = Field(
        128, ge=1, le=1_000_000, description="images a step; the last batch of an epoch may be smaller"
    )
    normalise: Literal["unit", "standard"] = Field(
        "unit", description="unit: pixels / 255; standard: then minus channel mean, over standard deviation"
    )
    precision: Literal["auto", "bfloat16", "float32"] = Field(
        "auto", description="auto: bfloat16 where the processor is fast at it, else float32"
    )
    compile: bool = Field(
        False,
        description="on a GPU, train with torch.compile (once for each batch size); no effect on a processor, which has"
        " fromzero's own kernels",
    )
    label_smoothing: float = Field(
        0.0, ge=0, lt=1, description="share of each label spread over all classes (Szegedy et al., 2016)"
    )
    logit_adjustment: float = Field(
        0.0,
        ge=0,
        le=10,
        description="in training the outputs have this times the log of each class's share of the train images added:"
        " with 1 the network learns to be right for all classes alike, however many images each has (Menon et al.,"
        " 2021, arXiv:2007.07314); 0: off",
    )
    ema_decay: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="score an exponential moving average of the weights, with this decay a step (Polyak and Juditsky,"
        " 1992); 0: off",
    )
    skip_easy: Rate = Field(
        0.0,
        description="share of the train images that each epoch after the first leaves out: those whose loss was lowest"
        " when last trained on (after Jiang et al., 2019, arXiv:1910.00762); running accuracy then covers the rest",
    )
    hardest: float = Field(
        1.0,
        gt=0,
        le=1,
        description="share of each batch that is trained on: the images with the highest loss for a proxy, a small"
        " network trained alongside (airbench96 of Jordan, 2024; after Coleman et al., 2020, arXiv:1906.11829);"
        " running accuracy then covers only these; 1: all, and no proxy",
    )
    proxy_channels: tuple[tuple[Count, ...], ...] = Field(
        (),
        description="channels of the proxy's convolutions, where there is one: [[16, 16], [32]]; empty: an eighth of"
        " the network's, at least 8; otherwise the proxy is as the network, without residual connections",
    )
    clean_train_images: int = Field(
        5000,
        ge=1,
        description="size of the fixed subset of train images for the clean train accuracy, one a class at least",
    )
    network: NetworkRecipe
    augment: AugmentRecipe = AugmentRecipe()
    optimizer: OptimizerRecipe = OptimizerRecipe()
    schedule: ScheduleRecipe = ScheduleRecipe()
    validation: ValidationRecipe = ValidationRecipe()

    @pydantic.field_validator("name")
    @classmethod
    def _can_be_printed(cls, given: str) -> str:
        if not given.isprintable():
            raise ValueError(f"{given!r} has characters that cannot be printed")
        return given

    @pydantic.model_validator(mode="after")
    def _crops_fit(self) -> Recipe:
        if (self.augment.crop or self.augment.scales) and self.network.head == "flatten":
            field = "scale" if self.augment.scales else "crop"
            raise ValueError(f"augment.{field} gives images of another size: it needs network.head max or mean")
        return self

    @pydantic.model_validator(mode="after")
    def _losses_are_of_one_image(self) -> Recipe:
        if self.skip_easy and self.augment.cutmix:
            raise ValueError("skip_easy goes by the loss of each image, which augment.cutmix mixes: give one of them")
        if self.skip_easy > self.hardest:
            raise ValueError(
                f"skip_easy: {self.skip_easy:g} of the images are to be skipped by their losses, and hardest trains on"
                f" {self.hardest:g} of them, which have one: lower skip_easy or raise hardest"
            )
        if self.augment.cutmix and round(self.hardest * self.batch_size) < 2:
            raise ValueError("augment.cutmix needs two images a step at least: raise batch_size or hardest")
        return self

    @pydantic.model_validator(mode="after")
    def _a_proxy_fits(self) -> Recipe:
        if self.hardest < 1:
            try:
                self.proxy_network()
            except pydantic.ValidationError as error:
                raise ValueError(f"proxy_channels: as network.channels, {_one_line(error)}") from None
        return self

    def proxy_network(self) -> NetworkRecipe:
        """The network of the proxy that finds the hardest images of a batch."""
        eighth = [[max(8, channels // 8) for channels in block] for block in self.network.channels]
        changes = {"channels": self.proxy_channels or eighth, "residual": False}
        return NetworkRecipe.model_validate(self.network.model_dump() | changes)

    def override(self, changes: Mapping[str, Any]) -> Recipe:
        """A copy with some fields changed, each named by its dotted path: `{"optimizer.name": "sgd"}`.

        Raises InputError for an unknown field or a value that does not fit.
        """
        tree = self.model_dump()
        for path, value in changes.items():
            if path not in field_types():
                raise InputError(f"unknown recipe field {path!r}{nearest(path, field_types())}")
            *parents, leaf = path.split(".")
            node = tree
            for parent in parents:
                node = node[parent]
            node[leaf] = value
        return _validated(tree, "recipe")

    def to_toml(self) -> str:
        """The complete recipe as TOML; `load_recipe` reads it back to an equal one."""
        text = tomli_w.dumps(self.model_dump())
        # tomli-w puts every element on a line of its own; [[32, 64], [128]] reads better on one.
        for pattern, joined in ((r",\n *\]", "]"), (r"\[\n +", "["), (r",\n +", ", ")):
            text = re.sub(pattern, joined, text)
        return text

    def fields(self) -> dict[str, Any]:
        """Dotted path of every field → its value, as JSON has it."""
        found, tree = {}, self.model_dump(mode="json")
        for path in field_types():
            value: Any = tree
            for key in path.split("."):
                value = value[key]
            found[path] = value
        return found

    def fingerprint(self) -> str:
        """SHA-256 (hex) over the recipe's fields; equal recipes have equal fingerprints."""
        return hashlib.sha256(json.dumps(self.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()


def recipe_names() -> list[str]:
    """Names of the recipes that come with fromzero."""
    return names_of("recipe")


def recipe_purpose(name: str) -> str:
    """What a recipe that comes with fromzero is for: the first line of its file, a comment."""
    header = text_of("recipe", name)
    return header.lstrip("# ").partition("\n")[0].removeprefix(f"{name}: ")


@checking_types
def load_recipe(source: str | Path) -> Recipe:
    """The built-in recipe of that name, or the recipe in that TOML file.

    A file may hold a whole recipe, or `base = "NAME or FILE"` and only what differs from it.
    Raises InputError, naming the file and the field, when something does not fit.
    """
    return _load(source, seen=())


def field_types() -> dict[str, tuple[Any, str]]:
    """Dotted path of every field → (its type, its description), in the order of the recipe."""
    return dict(_fields(Recipe))


def default_of(path: str) -> Any:
    """The value, as JSON has it, of the field at `path` where nothing is given."""
    *parents, leaf = path.split(".")
    model: Any = Recipe
    for parent in parents:
        model = model.model_fields[parent].annotation
    default = model.model_fields[leaf].default
    return list(default) if isinstance(default, tuple) else default


def parse_value(path: str, text: str) -> Any:
    """The value that `text` (from a command line) means for the field at `path`: TOML where that parses, else text."""
    if field_types().get(path, (None, ""))[0] is str:
        return text
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        return text


def _fields(model: type[pydantic.BaseModel], prefix: str = "") -> list[tuple[str, tuple[Any, str]]]:
    found: list[tuple[str, tuple[Any, str]]] = []
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, pydantic.BaseModel):
            found += _fields(field.annotation, f"{prefix}{name}.")
        else:
            found.append((prefix + name, (field.annotation, field.description or "")))
    return found


def _load(source: str | Path, seen: tuple[Path, ...]) -> Recipe:
    text, label = text_of("recipe", source), str(source)
    try:
        tree = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # more than TOMLDecodeError: endless numbers, bottomless lists
        raise InputError(f"{label}: not valid TOML: {error}") from None
    base = tree.pop("base", None)
    if base is not None:
        place = Path(source).resolve()
        if not isinstance(base, str):
            raise InputError(f"{label}: base must name another recipe or file, not {base!r}")
        here = Path(source).parent / base
        target = here if os.path.isfile(here) else Path(base)
        if os.path.isfile(target) and target.resolve() in (*seen, place):
            raise InputError(f"{label}: base must name another recipe or file: {base!r} is based on this one")
        try:
            inherited = _load(here if os.path.isfile(here) else base, (*seen, place))
        except InputError as error:
            raise InputError(f"{label}: base: {error}") from None
        tree = _merged(inherited.model_dump(), tree)
    return _validated(tree, label)


def _merged(tree: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = dict(tree)
    for key, value in changes.items():
        old = merged.get(key)
        merged[key] = _merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _validated(tree: dict[str, Any], label: str) -> Recipe:
    try:
        return Recipe.model_validate(tree)
    except pydantic.ValidationError as error:
        raise InputError(f"{label}: {_one_line(error)}") from None


def _one_line(error: pydantic.ValidationError) -> str:
    """The first complaint in words: field, what was given, what is admitted."""
    errors = error.errors()
    # A union reports one complaint for each of its members; the one whose type was meant is the deepest.
    first = max(
        (e for e in errors if e["loc"][:2] == errors[0]["loc"][:2]),
        key=lambda e: len(e["loc"]),
    )
    known = field_types()
    parts = [str(p) for p in first["loc"]]
    while parts and ".".join(parts) not in known and len(parts) > 1 and first["type"] != "extra_forbidden":
        parts.pop()  # index or union member: name the field itself
    path = ".".join(parts)
    if first["type"] == "extra_forbidden" and path in known and "." in path:
        return f"field {path!r} is written in quotes: write it without them, above the first table, or under its table"
    if first["type"] == "extra_forbidden":
        return f"unknown field {path!r}{nearest(path, known)}"
    if first["type"] == "missing":
        return f"field {path!r} is missing"
    given = " ".join(repr(first["input"]).split())
    given = given if len(given) <= 60 else given[:57] + "…"
    if first["type"] == "literal_error":
        choices = [c.strip("' ") for c in first["ctx"]["expected"].replace(" or ", ",").split(",")]
        near = nearest(str(first["input"]), choices)
        hint = near if near.startswith("; nearest") else ""
        return f"{path}: {given} is not one of {', '.join(choices)}{hint}"
    if first["type"] == "tuple_type":
        missing = _list_depth(known[path][0]) if path in known else 0
        numbers = re.fullmatch(r"[-+.,\d ]*\d[-+.,\d ]*", str(first["input"]))
        written = f": {'[' * missing}{first['input']}{']' * missing}" if numbers else ""
        return f"{path}: {given}: a list is meant{written}"
    if first["type"] == "model_type":
        return f"{path}: {given}: a table is meant: [{path}] and its fields below it"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        return f"{path}: {message}" if path else message
    return f"{path}: {given}: {message[0].lower()}{message[1:]}"


def _list_depth(annotation: Any) -> int:
    """How many lists a field of this type has inside one another."""
    if get_origin(annotation) is Annotated:
        return _list_depth(get_args(annotation)[0])
    if get_origin(annotation) is tuple:
        return 1 + _list_depth(get_args(annotation)[0])
    return 0
