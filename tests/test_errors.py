"""The errors: one base, and each child is also the builtin that callers expect."""

import pickle

import pytest

from retro_hf import errors


@pytest.mark.parametrize(
    ("name", "builtin"),
    [
        ("DatasetError", ValueError),
        ("DatastoreNotFoundError", FileNotFoundError),
        ("DatastoreExistsError", FileExistsError),
        ("DatastoreInputError", ValueError),
        ("DatastoreCorruptError", ValueError),
        ("DatastoreMismatchError", ValueError),
        ("PretrainedNotFoundError", FileNotFoundError),
        ("UnsupportedBackboneError", ValueError),
        ("UnsupportedEmbedderError", ValueError),
        ("RetrieverError", ValueError),
        ("MissingExtraError", ImportError),
    ],
)
def test_errors_are_retro_errors_and_builtins(name, builtin):
    kind = getattr(errors, name)
    error = kind("what, why, remedy")
    assert isinstance(error, errors.RetroError) and isinstance(error, builtin)
    assert str(error) == "what, why, remedy"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    assert kind.__doc__


def test_every_error_is_public():
    kinds = {name: value for name, value in vars(errors).items() if isinstance(value, type)}
    found = {name for name, kind in kinds.items() if issubclass(kind, errors.RetroError)}
    assert found == set(errors.__all__)


def test_missing_name_and_bad_folder_are_told_apart(tmp_path):
    error = errors.PretrainedNotFoundError.for_name("model", "org/modle", OSError("no such\n repository."))
    assert all(part in str(error) for part in ("'org/modle'", "model", "no such repository", "Hub"))
    error = errors.PretrainedNotFoundError.for_name("tokenizer", str(tmp_path), OSError("no file tokenizer.json"))
    assert all(part in str(error) for part in (f"The folder '{tmp_path}'", "no file tokenizer.json"))


@pytest.mark.parametrize(
    ("count", "said"), [(0, "0 chunks"), (1, "1 chunk"), (2, "2 chunks"), (12345, "12,345 chunks")]
)
def test_counted_uses_singular_and_plural(count, said):
    assert errors.counted(count, "chunk") == said
