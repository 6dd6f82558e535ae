"""What transformers' tests of pipelines check for the tasks of a causal language model, as checks of our own.

`PipelineTesterMixin` calls the classes below, which its source distribution lacks.
"""

import torch
from transformers import FeatureExtractionPipeline, PreTrainedModel, PreTrainedTokenizerBase, TextGenerationPipeline


EXAMPLES = ["This is a test", "Another test"]
NUM_NEW = 5


class TextGenerationPipelineTests:
    """Checks of `pipeline("text-generation")`."""

    def get_test_pipeline(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, dtype: str = "float32", **processors
    ) -> tuple[TextGenerationPipeline, list[str]]:
        """The pipeline, and examples for it."""
        pipeline = TextGenerationPipeline(
            model=model, tokenizer=tokenizer, dtype=dtype, max_new_tokens=NUM_NEW, do_sample=False
        )
        return pipeline, EXAMPLES

    def run_pipeline_test(self, pipeline: TextGenerationPipeline, examples: list[str]) -> None:
        """Raise an AssertionError if the pipeline does not do what transformers documents."""
        prompt = examples[0]
        (whole,) = pipeline(prompt)
        assert whole["generated_text"].startswith(prompt)
        (rest,) = pipeline(prompt, return_full_text=False)
        assert prompt + rest["generated_text"] == whole["generated_text"]
        (ids,) = pipeline(prompt, return_tensors=True)
        assert len(ids["generated_token_ids"]) == len(prompt) + NUM_NEW
        assert len(pipeline(prompt, num_return_sequences=2, do_sample=True)) == 2
        batch = pipeline(examples, batch_size=2)
        assert [text["generated_text"] for (text,) in batch] == [
            pipeline(example)[0]["generated_text"] for example in examples
        ]
        messages = [{"role": "user", "content": prompt}]
        (chat,) = pipeline(messages)
        assert chat["generated_text"][:1] == messages and chat["generated_text"][1]["role"] == "assistant"
        (cut,) = pipeline(prompt * 20, max_new_tokens=NUM_NEW, handle_long_generation="hole", return_tensors=True)
        assert len(cut["generated_token_ids"]) <= pipeline.tokenizer.model_max_length


class FeatureExtractionPipelineTests:
    """Checks of `pipeline("feature-extraction")`."""

    def get_test_pipeline(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, dtype: str = "float32", **processors
    ) -> tuple[FeatureExtractionPipeline, list[str]]:
        """The pipeline, and examples for it."""
        return FeatureExtractionPipeline(model=model, tokenizer=tokenizer, dtype=dtype), EXAMPLES

    def run_pipeline_test(self, pipeline: FeatureExtractionPipeline, examples: list[str]) -> None:
        """Raise an AssertionError if the pipeline does not do what transformers documents."""
        width = pipeline.model.config.get_text_config(decoder=True).hidden_size
        for example, found in zip(examples, pipeline(examples), strict=True):
            assert torch.tensor(found).shape == (1, len(example), width)
        assert pipeline(examples[0], return_tensors=True).shape == (1, len(examples[0]), width)
