"""transformers' own suites on every target: configurations, models, generation and pipelines.

They are not collected by default; `make test-suites` runs them and prints a line for each target.
"""

import tempfile
import unittest
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from unittest import mock

from ..tiny import randomize
from . import not_applicable
from .generation import GenerationTesterMixin, tiny_tokenizer
from .targets import TARGETS, ModelTester, Target
from .upstream import PACKAGE, load


models = load("test_modeling_common")
pipelines = load("test_pipeline_mixin")
ConfigTester = load("test_configuration_common").ConfigTester


class SuiteMixin:
    """What all suites share; `target` is the model under test."""

    target: Target

    def setUp(self):
        self.model_tester = ModelTester(self.target)
        self.enterContext(self.target.with_retriever())
        # The table of names in which the suite looks up that a class has no head, and so no loss.
        names = {self.target.base_class.config_class.model_type: self.target.base_class.__name__}
        self.enterContext(mock.patch.dict(models.MODEL_MAPPING_NAMES, names))

    def skipTest(self, reason):
        if not not_applicable.may_leave_itself_out(self._testMethodName, reason):
            self.fail(f"The test leaves itself out for a reason that is not in `LEAVES_ITSELF_OUT`: {reason}")
        super().skipTest(reason)

    def test_config(self):
        tester = ConfigTester(self, config_class=self.target.base_class.config_class)
        for name in (name for name in dir(tester) if name.startswith(("create_and_test_", "check_config_"))):
            with self.subTest(name):
                getattr(tester, name)()

    def run_task_tests(self, task, dtype="float32"):
        """Run the tests of a pipeline on a model of the target that was saved, not on one of the Hub."""
        folder = Path(self.enterContext(tempfile.TemporaryDirectory()))
        summary = {}
        for model_class in self.all_model_classes:
            model = randomize(model_class(self.target.config()), scale=0.3)
            path = folder / model.config.model_type / model_class.__name__
            model.save_pretrained(path)
            tiny_tokenizer().save_pretrained(path)
            summary[model_class.__name__] = {"tokenizer_classes": ["PreTrainedTokenizerFast"], "processor_classes": []}
        with mock.patch.multiple(pipelines, TRANSFORMERS_TINY_MODEL_PATH=str(folder), tiny_model_summary=summary):
            super().run_task_tests(task, dtype=dtype)


def expected_to_fail(test: Callable, entry: not_applicable.NotApplicable) -> Callable:
    """The test of a table entry: left out if the original fails as the table says, otherwise a failure."""

    @wraps(test)
    def run(self):
        original = type("Original", (type(self),), {test.__name__: test})(test.__name__)
        result = unittest.TestResult()
        original.run(result)
        tracebacks = [text for _, text in result.errors + result.failures]
        if not tracebacks:
            self.fail(
                f"{test.__name__} is listed as not applicable ({entry.reason}), but it does not fail: unlist it."
            )
        for text in tracebacks:
            self.assertIn(entry.error, text, f"{test.__name__} fails in another way than it is listed for")
        raise unittest.SkipTest(entry.reason)

    return run


def suite_of(target: Target) -> type[unittest.TestCase]:
    """The test case of one target."""
    body = {
        "__module__": __name__,
        "target": target,
        "all_model_classes": (target.base_class, target.causal_lm_class),
        "pipeline_model_mapping": {"feature-extraction": target.base_class, "text-generation": target.causal_lm_class},
        "_is_composite": target.is_retro,
        # Without neighbors, nothing that RETRO adds is used.
        "test_all_params_have_gradient": target.is_live or not target.is_retro,
    }
    mixins = (models.ModelTesterMixin, GenerationTesterMixin, pipelines.PipelineTesterMixin)
    suite = type(target.suite_name, (SuiteMixin, *mixins, unittest.TestCase), body)
    for test in unittest.TestLoader().getTestCaseNames(suite):
        if entry := not_applicable.find(test, target):
            setattr(suite, test, expected_to_fail(getattr(suite, test), entry))
    return suite


for _entry in pipelines.pipeline_test_mapping.values():
    if isinstance(_entry["test"], str):  # older releases import the classes themselves
        _entry["test"] = _entry["test"].replace("tests.", f"{PACKAGE}.", 1)
globals().update({suite.__name__: suite for suite in map(suite_of, TARGETS)})
