"""Recipes: complete, frozen, equal when read back, and refused in one line that says where and what instead."""

import json
import re
import subprocess
import sys
import tomllib

import numpy as np
import pydantic
import pytest

from fromzero.changes import ACTS_WHERE, notes_on_changes
from fromzero.errors import InputError
from fromzero.recipe import (
    Recipe,
    field_types,
    load_recipe,
    parse_value,
    recipe_names,
)

NETWORK = "[network]\nchannels = [[32, 64], [128]]\n"
BUILT_IN = pytest.mark.parametrize("name", ["train1", "train2", "train3"])


def refused(action, *arguments):
    with pytest.raises(InputError) as caught:
        action(*arguments)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert len(message) < 500
    return message


@pytest.fixture
def write(tmp_path):
    """write(text): the path of a recipe file with that text."""

    def to(text, name="mine.toml"):
        (tmp_path / name).write_text(text, "utf-8")
        return tmp_path / name

    return to


@BUILT_IN
def test_built_in_recipes_are_what_the_notes_say(name):
    recipe = load_recipe(name)
    assert name in recipe_names()
    assert (recipe.name, recipe.dataset, recipe.validation.source) == (name, "cifar10", "test")
    assert recipe.epochs == {"train1": 30, "train2": 50, "train3": 50}[name]
    assert [len(block.channels) for block in recipe.network.blocks()] == ([1] * 5 if name == "train1" else [2, 1, 1, 1])
    assert [units for units, _ in recipe.network.dense_layers()] == ([1024] * 2 if name == "train3" else [64])


CHANGES = {
    "name": 'a "name" of – \\ two words',
    "seed": 2**70,
    "optimizer.learning_rate": 1e-7,
    "optimizer.weight_decay": 0.1 + 0.2,
    "network.channels": [[1], [2, 3]],
    "network.padding": ["same", "valid"],
    "network.pool": 1,
    "network.block_dropout": [0.0, 0.25],
    "network.dense": [],
    "network.dense_dropout": [],
    "network.activation_layers": [True, False],
}


@pytest.mark.parametrize("changes", [{}, CHANGES, {"network.dense_dropout": 0, "schedule.name": "cosine"}])
@BUILT_IN
def test_what_is_written_is_read_back_equal_and_complete(name, changes, write):
    recipe = load_recipe(name).override(changes)
    again = load_recipe(write(recipe.to_toml()))
    assert again == recipe
    assert again.fingerprint() == recipe.fingerprint()
    written = tomllib.loads(recipe.to_toml())
    assert all(value_at(written, path) is not None for path in field_types())
    assert Recipe.model_validate(json.loads(recipe.model_dump_json())) == recipe


def value_at(tree, path):
    for part in path.split("."):
        tree = tree[part]
    return tree


OTHER = {
    "name": "other", "dataset": "digits", "seed": 1, "epochs": 7, "batch_size": 64, "normalise": "standard",
    "precision": "float32", "compile": True, "label_smoothing": 0.1, "logit_adjustment": 1.0,
    "ema_decay": 0.99, "skip_easy": 0.3,
    "hardest": 0.5, "proxy_channels": [[8], [8], [8], [9]], "clean_train_images": 1,
    "network.channels": [[8, 8], [8], [8], [9]],
    "network.padding": ["same", "valid", "same", "same"], "network.pool": 1, "network.block_dropout": 0.1,
    "network.pool_after": "first", "network.activation": "gelu", "network.batch_norm": True, "network.residual": True,
    "network.whitening": 2, "network.whitening_directions": 8, "network.whitening_padding": "same",
    "network.initial": "dirac", "network.head": "max", "network.logit_scale": 0.5,
    "network.dense": [7], "network.dense_dropout": [0.5, 0.4], "network.dropout_from_epoch": 0.5,
    "network.activation_layers": False, "network.dense_activation_layers": True, "augment.flip": "random",
    "augment.translate": 2, "augment.crop": 24, "augment.scale": 0.5, "augment.scale_epochs": 1.5,
    "augment.rotate": 15.0, "augment.colour": 0.2, "augment.cutout": 5, "augment.cutmix": 0.5, "optimizer.name": "muon",
    "optimizer.learning_rate": 0.1, "optimizer.head_learning_rate": 0.2, "optimizer.bias_learning_rate": 0.3,
    "optimizer.momentum": 0.8, "optimizer.muon_momentum": 0.7, "optimizer.nesterov": True, "optimizer.beta1": 0.8,
    "optimizer.beta2": 0.9, "optimizer.epsilon": 1e-8, "optimizer.weight_decay": 1e-4, "schedule.name": "cosine",
    "schedule.warmup_epochs": 1.5, "validation.source": "split", "validation.fraction": 0.2, "validation.folds": 4,
    "validation.fold": 3,
}  # fmt: skip


def test_an_override_changes_its_field_alone_and_the_fingerprint():
    recipe = load_recipe("train3").override({"network.head": "mean", "network.channels": [[8, 8], [8], [8], [8]]})
    assert list(field_types()) == list(OTHER)
    seen = {recipe.fingerprint()}
    for path, value in OTHER.items():
        changed = recipe.override({path: value})
        before, after = recipe.model_dump(mode="json"), changed.model_dump(mode="json")
        assert [p for p in field_types() if value_at(before, p) != value_at(after, p)] == [path]
        assert value_at(after, path) == value
        seen.add(changed.fingerprint())
    assert len(seen) == 1 + len(OTHER)
    assert recipe.override({}).fingerprint() == recipe.fingerprint()
    assert recipe.override({"seed": 1, "epochs": 7}) == recipe.override({"epochs": 7}).override({"seed": 1})


def test_recipes_are_frozen_through_and_through():
    recipe = load_recipe("train3")
    for part, field in ((recipe, "epochs"), (recipe.network, "pool"), (recipe.optimizer, "name")):
        with pytest.raises(pydantic.ValidationError):
            setattr(part, field, getattr(part, field))
    assert isinstance(hash(recipe), int)  # no list or dict anywhere in it
    with pytest.raises(TypeError):
        recipe.network.channels[0][0] = 1


def test_single_values_are_spread_over_blocks_and_layers(write):
    network = load_recipe(
        write(NETWORK + "padding = ['valid', 'same']\nblock_dropout = 0.3\ndense = [5, 6]\ndense_dropout = [0.1, 0.2]")
    ).network
    assert network.blocks() == (((32, 64), "valid", 2, 0.3, True), ((128,), "same", 2, 0.3, True))
    assert network.dense_layers() == ((5, 0.1), (6, 0.2))


def test_a_file_may_hold_only_what_differs_from_its_base(write, tmp_path, monkeypatch):
    write('base = "train2"\nepochs = 3\n[optimizer]\nname = "sgd"', "first.toml")
    second = write('base = "first.toml"\nname = "second"\n[optimizer]\nlearning_rate = 0.1', "second.toml")
    expected = {"epochs": 3, "optimizer.name": "sgd", "name": "second", "optimizer.learning_rate": 0.1}
    assert load_recipe(second) == load_recipe("train2").override(expected)
    monkeypatch.chdir(tmp_path.parent)  # a base is looked for beside the file that names it
    assert load_recipe(second.relative_to(tmp_path.parent)) == load_recipe(str(second))


@pytest.mark.parametrize("base", ["mine.toml", "./mine.toml", "../{folder}/mine.toml", "other.toml"])
def test_a_circle_of_bases_is_refused(base, write, tmp_path):
    write('base = "mine.toml"', "other.toml")
    assert "base must name another recipe or file" in refused(
        load_recipe, write(f'base = "{base.format(folder=tmp_path.name)}"')
    )


def test_a_circle_of_bases_found_from_where_one_stands_is_refused(write, tmp_path, monkeypatch):
    folder = tmp_path / "recipes"
    folder.mkdir()
    (folder / "x.toml").write_text('base = "recipes/x.toml"')  # which is not beside it
    monkeypatch.chdir(tmp_path)
    assert refused(load_recipe, "recipes/x.toml").count("base must name another recipe or file") == 1
    (folder / "x.toml").write_text('base = "recipes/y.toml"')
    (folder / "y.toml").write_text('base = "recipes/x.toml"')
    assert refused(load_recipe, "recipes/x.toml").count("base must name another recipe or file") == 1


BAD = [
    # fields that are not there
    ("epoch = 3\n" + NETWORK, "unknown field 'epoch'; nearest: epochs"),
    ("learning_rate = 1\n" + NETWORK, "unknown field 'learning_rate'; nearest: optimizer.learning_rate"),
    (NETWORK + "dens = [3]", "unknown field 'network.dens'; nearest: network.dense"),
    (NETWORK + "[optimizer]\nlr = 1", "unknown field 'optimizer.lr'; nearest: optimizer.learning_rate"),
    (NETWORK + "[schedule]\nwarmup = 1", "unknown field 'schedule.warmup'; nearest: schedule.warmup_epochs"),
    (NETWORK + "[validation]\nshare = 1", "unknown field 'validation.share'"),
    (NETWORK + "[optimiser]\nname = 'sgd'", "unknown field 'optimiser'; nearest: optimizer"),
    ('"a\\nb" = 3\n' + NETWORK, "unknown field 'a\\nb'"),
    ("", "field 'network' is missing"),
    ("[network]\npool = 2", "field 'network.channels' is missing"),
    # values of another type
    ("epochs = 'ten'\n" + NETWORK, "epochs: 'ten': input should be a valid integer"),
    ("epochs = [1]\n" + NETWORK, "epochs: [1]: input should be a valid integer"),
    ("epochs = true\n" + NETWORK, "epochs: true is not a number"),
    ("seed = false\n" + NETWORK, "seed: false is not a number"),
    (NETWORK + "[optimizer]\nlearning_rate = true", "optimizer.learning_rate: true is not a number"),
    (NETWORK + "pool = true", "network.pool: true is not a number"),
    (NETWORK + "block_dropout = [0.1, false]", "network.block_dropout: false is not a number"),
    ("[network]\nchannels = [[3], [true]]", "network.channels: true is not a number"),
    ("epochs = 1.5\n" + NETWORK, "epochs: 1.5: input should be a valid integer"),
    ("epochs = 2020-01-01\n" + NETWORK, "epochs: datetime.date(2020, 1, 1): input should be a valid integer"),
    ("name = 3\n" + NETWORK, "name: 3: input should be a valid string"),
    ("epochs = " + "[" * 200 + "]" * 200 + "\n" + NETWORK, "epochs: [[["),
    (NETWORK + "pool = 'big'", "network.pool: 'big': input should be a valid integer"),
    (NETWORK + "activation_layers = 3", "network.activation_layers: 3: input should be a valid boolean"),
    ("[network]\nchannels = 'abc'", "network.channels: 'abc': a list is meant"),
    ("[network]\nchannels = [3, 4]", "network.channels: 3: a list is meant: [[3]]"),
    ("[network]\nchannels = 3", "network.channels: 3: a list is meant: [[3]]"),
    (NETWORK + "dense = 512", "network.dense: 512: a list is meant: [512]"),
    ('"optimizer.name" = "sgd"\n' + NETWORK, "field 'optimizer.name' is written in quotes"),
    ('optimizer = "sgd"\n' + NETWORK, "optimizer: 'sgd': a table is meant: [optimizer]"),
    ('base = "nope"', "base: unknown recipe 'nope'"),
    (NETWORK + "dense = '512, 256'", "network.dense: '512, 256': a list is meant: [512, 256]"),
    (NETWORK + "dense = {a = 1}", "network.dense: {'a': 1}: a list is meant"),
    ("[network]\nchannels = [[3, 4.5]]", "network.channels: 4.5: input should be a valid integer"),
    # values out of range
    ("epochs = 0\n" + NETWORK, "epochs: 0: input should be greater than or equal to 1"),
    ("seed = -1\n" + NETWORK, "seed: -1: input should be greater than or equal to 0"),
    ("name = ''\n" + NETWORK, "name: '': string should have at least 1 character"),
    ("[network]\nchannels = []", "network.channels: []: tuple should have at least 1 item"),
    ("[network]\nchannels = [[3], []]", "network: channels has a block without a convolution"),
    ("[network]\nchannels = [[3, 0]]", "network.channels: 0: input should be greater than or equal to 1"),
    (NETWORK + "pool = 0", "network.pool: 0: input should be greater than or equal to 1"),
    (NETWORK + "pool = [2, 0]", "network.pool: 0: input should be greater than or equal to 1"),
    (NETWORK + "block_dropout = 1.0", "network.block_dropout: 1.0: input should be less than 1"),
    (NETWORK + "block_dropout = [0.1, 1.5]", "network.block_dropout: 1.5: input should be less than 1"),
    (NETWORK + "[optimizer]\nlearning_rate = 0", "optimizer.learning_rate: 0: input should be greater than 0"),
    (NETWORK + "[optimizer]\nlearning_rate = nan", "optimizer.learning_rate: nan: input should be a finite number"),
    (NETWORK + "[optimizer]\nweight_decay = inf", "optimizer.weight_decay: inf: input should be a finite number"),
    (NETWORK + "[validation]\nfraction = 1", "validation.fraction: 1: input should be less than 1"),
    # lists of another length
    (NETWORK + "padding = ['same', 'same', 'same']", "network: padding has 3 values where channels has 2"),
    (NETWORK + "pool = [2]", "network: pool has 1 values where channels has 2"),
    (NETWORK + "block_dropout = []", "network: block_dropout has 0 values where channels has 2"),
    (NETWORK + "activation_layers = [true]", "network: activation_layers has 1 values where channels has 2"),
    (NETWORK + "dense_dropout = [0.1, 0.2]", "network: dense_dropout has 2 values where dense has 1"),
    # words that are not among the choices
    ("normalise = 'standart'\n" + NETWORK, "normalise: 'standart' is not one of unit, standard; nearest: standard"),
    ("normalise = 3\n" + NETWORK, "normalise: 3 is not one of unit, standard"),
    (NETWORK + "padding = 'vaild'", "network.padding: 'vaild' is not one of same, valid; nearest: valid"),
    (NETWORK + "padding = ['same', 'vaild']", "network.padding: 'vaild' is not one of same, valid; nearest: valid"),
    (
        NETWORK + "[optimizer]\nname = 'adamm'",
        "optimizer.name: 'adamm' is not one of sgd, adam, adamw, muon; nearest: adam",
    ),
    # tables where values belong, and the other way round
    (NETWORK + "[epochs]\nx = 1", "epochs: {'x': 1}: input should be a valid integer"),
    (NETWORK + "[network.padding]\na = 1", "network.padding: {'a': 1} is not one of same, valid"),
    ("network = 3", "network: 3: "),
    ("[[network]]\nchannels = [[3]]", "network: [{'channels': [[3]]}]: "),
    ("optimizer = 'sgd'\n" + NETWORK, "optimizer: 'sgd': "),
    ("base = 'train1'\noptimizer = 'sgd'", "optimizer: 'sgd': "),
    ("base = 'train1'\n[epochs]\nx = 1", "epochs: {'x': 1}: "),
    # bases
    ("base = 3", "base must name another recipe or file, not 3"),
    ("base = ['train1']", "base must name another recipe or file, not ['train1']"),
    ("base = 'train4'", "unknown recipe 'train4'; nearest: train3"),
    ("base = '.'", "unknown recipe '.'"),
    ('base = "a\\nb.toml"', "recipe file 'a\\nb.toml': No such file or directory"),
    ('base = "a\\u0000.toml"', "recipe file 'a\\x00.toml': embedded null byte"),
    ("base = '" + "x" * 300 + "'", "unknown recipe 'xxx"),
    # what is no TOML
    ("epochs = = 3", "not valid TOML: Invalid value (at line 1, column 10)"),
    ("epochs = 3\nepochs = 4", "not valid TOML: Cannot overwrite a value"),
    ("epochs = " + "9" * 5000, "not valid TOML: "),
    ("epochs = " + "[" * 5000 + "]" * 5000, "not valid TOML: "),
]


@pytest.mark.parametrize(("text", "expected"), BAD, ids=[expected[:40].replace("\\", "") for _, expected in BAD])
def test_a_file_that_does_not_fit_is_refused_by_field_and_value(text, expected, write):
    path = write(text)
    message = refused(load_recipe, path)
    assert expected in message
    assert str(path) in message or "base" in text


def test_what_is_no_recipe_file_is_refused(tmp_path):
    (tmp_path / "latin.toml").write_bytes('name = "é"'.encode("latin-1"))
    (tmp_path / "folder.toml").mkdir()
    for name, expected in {
        "latin.toml": "not UTF-8 text",
        "folder.toml": "Is a directory",
        "none.toml": "No such file or directory",
    }.items():
        assert refused(load_recipe, tmp_path / name) == f"recipe file '{tmp_path / name}': {expected}"
    for name in (tmp_path, "", "train", "x" * 300):
        assert "unknown recipe" in refused(load_recipe, name)
    assert "nearest: train3" in refused(load_recipe, "trian3")


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("optimizer.lr", 1, "unknown recipe field 'optimizer.lr'; nearest: optimizer.learning_rate"),
        ("lr", 1, "nearest: optimizer.learning_rate"),
        ("optimizer", {"name": "sgd"}, "unknown recipe field 'optimizer'"),
        ("network.channels.0", [1], "unknown recipe field 'network.channels.0'"),
        ("epochs", None, "epochs: None: "),
        ("epochs", float("nan"), "epochs: nan: "),
        ("optimizer.name", "sdg", "optimizer.name: 'sdg' is not one of sgd, adam, adamw, muon; nearest: sgd"),
        ("network.pool", [2, 2], "network: pool has 2 values where channels has 4"),
        ("epochs", np.zeros((3, 3)), "epochs: array([[0., 0., 0.], [0., 0., 0.]"),
    ],
)
def test_an_override_that_does_not_fit_is_refused_by_field_and_value(path, value, expected):
    assert expected in refused(load_recipe("train3").override, {path: value})


@pytest.mark.parametrize(
    ("path", "text", "value"),
    [
        ("epochs", "3", 3),
        ("optimizer.learning_rate", "1e-3", 0.001),
        ("optimizer.nesterov", "true", True),
        ("optimizer.name", "sgd", "sgd"),
        ("optimizer.name", '"sgd"', "sgd"),
        ("network.channels", "[[1], [2, 3]]", [[1], [2, 3]]),
        ("network.padding", "same", "same"),
        ("network.padding", '["same", "valid"]', ["same", "valid"]),
        ("name", "3", "3"),
        ("dataset", "[a]", "[a]"),
        ("epochs", "[3", "[3"),
        ("epochs", "", ""),
        ("epochs", "9" * 5000, "9" * 5000),
        ("epochs", "[" * 5000, "[" * 5000),
    ],
)
def test_text_from_the_command_line_becomes_the_value_that_it_means(path, text, value):
    assert parse_value(path, text) == value


def test_every_field_is_described_and_its_text_form_is_read_back():
    recipe = load_recipe("train3").override({**OTHER, "network.dense": [7, 7], "skip_easy": 0.0})
    for path, (_, description) in field_types().items():
        assert description
        value = value_at(recipe.model_dump(mode="json"), path)
        text = value if isinstance(value, str) else json.dumps(value)
        assert recipe.override({path: parse_value(path, text)}) == recipe


def test_recipes_need_neither_torch_nor_numpy():
    code = "import sys; from fromzero.recipe import *; load_recipe('train3').to_toml(); print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "fromzero.recipe" in modules
    assert not {"torch", "numpy"} & set(modules)


def test_changes_that_do_nothing_are_named():
    def said(base, **changes):
        base, changes = load_recipe(base), {path.replace("__", "."): value for path, value in changes.items()}
        return notes_on_changes(base, base.override(changes), changes)

    assert said("few", optimizer__nesterov=True, optimizer__beta1=0.5, optimizer__beta2=0.9) == [
        "--optimizer.nesterov has no effect here, only with --optimizer.name sgd",
        "--optimizer.beta1 and --optimizer.beta2 have no effect here, only with --optimizer.name adam or adamw",
    ]
    assert said("few", network__dense_dropout=0.5, augment__scale=0.5, proxy_channels=[[8], [8], [8]]) == [
        "--network.dense_dropout has no effect here, only behind hidden layers: --network.dense",
        "--augment.scale has no effect here, only with --augment.scale_epochs",
        "--proxy_channels has no effect here, only with --hardest",
    ]
    assert said("few", network__dense_dropout=0.0, augment__scale=1.0, optimizer__momentum=0.5) == []
    assert said("train1", optimizer__beta1=0.5, network__dense_dropout=0.5, optimizer__momentum=0.9) == []
    (one,) = said("train1", optimizer__name="sgd", optimizer__epsilon=1e-3, optimizer__learning_rate=0.1)
    assert one.startswith("--optimizer.epsilon has no effect here")
    for paths, acts, where in ACTS_WHERE:
        assert {*paths} <= {*field_types()}
        assert any(acts(load_recipe(name)) for name in recipe_names()) or paths[0] in (
            "optimizer.nesterov",
            "validation.folds",
        )
        for option in re.findall(r"--([\w.]+)", where):
            assert option in field_types()
