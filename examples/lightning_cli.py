"""Quantize from a config file: a LightningCLI program stays as it is, the callbacks come with lightning_cli.yaml.

Run: python examples/lightning_cli.py fit --trainer.max_epochs 3
     python examples/lightning_cli.py validate --config examples/lightning_cli.yaml \
         --model.network.init_args.weights lightning_logs/version_0/checkpoints/*.ckpt
(Under a minute on a CPU. With `fit --model.learning_rate 3e-5` instead of `validate` it fine-tunes.
Needs pip install 'jsonargparse[signatures]'.)
"""

from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from lightning_quant.domains.segmentation.datamodule import SyntheticScenesDataModule
from lightning_quant.domains.segmentation.task import SegmentationTask


class Program(LightningCLI):
    """Any LightningCLI: it knows nothing of quantization."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        scenes = {"root": "data/scenes", "train": 200, "val": 24, "height": 64, "width": 128}
        parser.set_defaults({f"data.{name}": value for name, value in scenes.items()})
        parser.set_defaults({"model.network": {"class_path": "lightning_quant.domains.segmentation.ffnet.ffnet_nano"}})


if __name__ == "__main__":
    Program(SegmentationTask, SyntheticScenesDataModule, seed_everything_default=0)
