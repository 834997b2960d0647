"""Evaluation of the box-level results beside the mask-level ones."""

from __future__ import annotations

from collections.abc import Sequence

from detectron2.evaluation import DatasetEvaluator


class BoxLevelEvaluator(DatasetEvaluator):
    """Gives the "box_instances" of a model to another evaluator, whose results it names "box_level_<task>"."""

    def __init__(self, evaluator: DatasetEvaluator) -> None:
        """
        Args:
            evaluator: evaluates "instances" of boxes.
        """
        self.evaluator = evaluator

    def reset(self) -> None:
        self.evaluator.reset()

    def process(self, inputs: Sequence[dict], outputs: Sequence[dict]) -> None:
        """Take outputs of a model whose MODEL.MNC.OUTPUTS has "box_instances".

        Raises:
            ValueError: they have none.
        """
        if any("box_instances" not in output for output in outputs):
            raise ValueError(
                'MODEL.MNC.OUTPUTS has "box_instances", but the model returns none: MODEL.META_ARCHITECTURE must be '
                '"MultitaskNetworkCascade".'
            )
        self.evaluator.process(inputs, [{"instances": output["box_instances"]} for output in outputs])

    def evaluate(self) -> dict[str, dict[str, float]] | None:
        """Return the results of the other evaluator by their new names; None where it returns none."""
        results = self.evaluator.evaluate()
        return {f"box_level_{task}": scores for task, scores in results.items()} if results else results
