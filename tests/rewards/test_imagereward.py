"""ImageReward from its published layout, against the network written out from the papers in float64."""

import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import gelu, layer_norm, scaled_dot_product_attention

from diffalign import media
from diffalign.rewards import check_gradient
from diffalign.rewards.imagereward import ImageReward
from tests.parity.imagereward_case import PROMPTS, WORDS, pictures, random_checkpoint, write_tokenizer

SHAPES = [(64, 64), (50, 40), (40, 89)]  # to 32 pixels: square, tall, and 39 columns too many, an odd half
TEXTS = ["a red circle", "two blue squares, zzz", ""]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    file = tmp_path_factory.mktemp("imagereward") / "ImageReward.pt"
    torch.save(random_checkpoint(), file)
    return file


@pytest.fixture
def reward(checkpoint, tokenizer):
    return ImageReward(checkpoint, tokenizer=tokenizer)


def batch(shape=(50, 40), count=3):
    return media.from_pil(list(pictures([shape] * count)))


def attend(queries, keys, values, mask=None):
    """Heads of 64 numbers; (B, N, D) each."""
    queries, keys, values = (x.unflatten(-1, (-1, 64)).transpose(1, 2) for x in (queries, keys, values))
    return scaled_dot_product_attention(queries, keys, values, attn_mask=mask).transpose(1, 2).flatten(2)


class WrittenOut:
    """ViT (Dosovitskiy et al. 2021) and BERT (Devlin et al. 2019) with cross-attention, from tensors by name."""

    def __init__(self, weights):
        self.weights = {name: tensor.double() for name, tensor in weights.items()}

    def linear(self, x, name):
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def norm(self, x, name, epsilon):
        return layer_norm(x, x.shape[-1:], self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], epsilon)

    def image(self, pixels, layers=2, patch=8):
        name = "blip.visual_encoder"
        patches = (
            pixels.unfold(2, patch, patch).unfold(3, patch, patch).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
        )
        filters = self.weights[f"{name}.patch_embed.proj.weight"].flatten(1)
        x = patches @ filters.T + self.weights[f"{name}.patch_embed.proj.bias"]
        x = torch.cat([self.weights[f"{name}.cls_token"].expand(len(x), -1, -1), x], 1)
        x = x + self.weights[f"{name}.pos_embed"]
        for block in (f"{name}.blocks.{layer}" for layer in range(layers)):
            parts = self.linear(self.norm(x, f"{block}.norm1", 1e-6), f"{block}.attn.qkv").chunk(3, -1)
            x = x + self.linear(attend(*parts), f"{block}.attn.proj")
            hidden = gelu(self.linear(self.norm(x, f"{block}.norm2", 1e-6), f"{block}.mlp.fc1"))
            x = x + self.linear(hidden, f"{block}.mlp.fc2")
        return self.norm(x, f"{name}.norm", 1e-6)

    def attention(self, x, source, name, mask):
        parts = (
            self.linear(x, f"{name}.self.query"),
            *(self.linear(source, f"{name}.self.{k}") for k in ("key", "value")),
        )
        y = self.linear(attend(*parts, mask), f"{name}.output.dense")
        return self.norm(x + y, f"{name}.output.LayerNorm", 1e-12)

    def text(self, ids, mask, seen, layers=2):
        name = "blip.text_encoder.embeddings"
        x = self.weights[f"{name}.word_embeddings.weight"][ids]
        x = self.norm(
            x + self.weights[f"{name}.position_embeddings.weight"][: ids.shape[1]], f"{name}.LayerNorm", 1e-12
        )
        for layer in (f"blip.text_encoder.encoder.layer.{number}" for number in range(layers)):
            x = self.attention(x, x, f"{layer}.attention", mask.bool()[:, None, None])
            x = self.attention(x, seen, f"{layer}.crossattention", None)
            hidden = gelu(self.linear(x, f"{layer}.intermediate.dense"))
            x = self.norm(x + self.linear(hidden, f"{layer}.output.dense"), f"{layer}.output.LayerNorm", 1e-12)
        return x

    def score(self, pixels, ids, mask):
        x = self.text(ids, mask, self.image(pixels))[:, 0]
        for number in (0, 2, 4, 6, 7):
            x = self.linear(x, f"mlp.layers.{number}")
        return (x[:, 0] - 0.16717362830052426) / 1.0333394966054072


def wordpieces(prompt):
    """[CLS] words [SEP], padded to 35; a word is known, or spelt."""
    tokens = []
    for word in prompt.lower().replace(",", " , ").split():
        tail = ["##s"] if word in ("circles", "squares") else []
        stem = word.removesuffix("s") if tail else word
        tokens += [*([stem] if stem in WORDS else [stem[0], *(f"##{letter}" for letter in stem[1:])]), *tail]
    ids = [WORDS.index(token) for token in ("[CLS]", *tokens[:33], "[SEP]")]
    return torch.tensor(ids + [0] * (35 - len(ids))), torch.tensor([1] * len(ids) + [0] * (35 - len(ids)))


def by_pillow(picture, edge=32):
    """Shortest edge to 32, centre crop with the half pixel rounded to even, OpenAI's mean and deviation."""
    scale = edge / min(picture.size)
    picture = picture.resize([int(length * scale + 1e-9) for length in picture.size], 3)
    left, top = (round((length - edge) / 2) for length in picture.size)
    pixels = np.asarray(picture.crop((left, top, left + edge, top + edge)), dtype=np.float64) / 255
    pixels = (pixels - [0.48145466, 0.4578275, 0.40821073]) / [0.26862954, 0.26130258, 0.27577711]
    return torch.from_numpy(pixels).permute(2, 0, 1)[None]


def test_scores_equal_the_network_written_out(reward, checkpoint):
    network = WrittenOut(torch.load(checkpoint, weights_only=True))
    ours, theirs = [], []
    for picture, prompt in zip(pictures(SHAPES), [*TEXTS[:2], PROMPTS[4]], strict=True):
        ids, mask = wordpieces(prompt)
        theirs.append(network.score(by_pillow(picture), ids[None], mask[None]))
        ours.append(reward(media.from_pil([picture]), [prompt]).value)
    torch.testing.assert_close(torch.cat(ours).double(), torch.cat(theirs), rtol=0, atol=5e-6)
    assert torch.cat(theirs).std() > 0.1  # the comparison would notice a difference


def test_a_score_does_not_depend_on_its_batch(reward):
    images = batch()
    together = reward(images, TEXTS).value
    alone = torch.cat([reward(images[i : i + 1], TEXTS[i : i + 1]).value for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=0, atol=2e-6)
    assert reward(images, TEXTS[:1] * 3).value.std() > 0.01  # it reads the images
    assert reward(images[:1].expand(3, -1, -1, -1), TEXTS).value.std() > 0.01  # and the prompts


def test_gradient_is_that_of_the_smooth_path(reward, monkeypatch):
    """Along random directions the gradient equals finite differences of the same network without the roundings."""
    reward.vision.double()
    reward.text.double()
    reward.weight, reward.bias = reward.weight.double(), reward.bias.double()
    images = batch().double() * 0.8 + 0.1
    leaf = images.clone().requires_grad_()
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    reward.preprocessing = replace(reward.preprocessing, rounding=False)
    reward.values(leaf, TEXTS, [{}] * 3).sum().backward()
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        direction = torch.randn(images.shape, generator=generator, dtype=torch.float64)
        ahead, behind = (reward.values(images + h * direction, TEXTS, [{}] * 3).sum() for h in (1e-5, -1e-5))
        torch.testing.assert_close((leaf.grad * direction).sum(), (ahead - behind) / 2e-5, rtol=1e-5, atol=1e-9)


def test_gradient_reaches_the_images_and_not_the_weights(reward):
    assert (check_gradient(reward, batch(), TEXTS) > 0).all()
    assert not any(p.requires_grad or p.is_meta for p in (*reward.vision.parameters(), *reward.text.parameters()))
    assert not any(module.training for module in (*reward.vision.modules(), *reward.text.modules()))


def test_a_float_image_scores_as_its_saved_file(reward, tmp_path):
    images = torch.rand(1, 3, 50, 40, generator=torch.Generator().manual_seed(0))
    media.save_png(images[0], tmp_path / "image.png")
    saved = media.from_pil(media.open_image(tmp_path / "image.png"))
    assert torch.equal(reward(images, TEXTS[:1]).value, reward(saved, TEXTS[:1]).value)


def test_a_long_prompt_is_cut_off_counted_and_told_once(reward, caplog):
    long = ["red " * 33, "red " * 34, "red " * 33 + "blue square", "red " * 34]  # 35 tokens, 36, 37, 36 again
    with caplog.at_level(logging.WARNING):
        scores = reward(batch(count=1).expand(4, -1, -1, -1), long).value
    assert scores.max() - scores.min() < 2e-6
    assert reward.truncated_prompts == 2
    assert len(caplog.records) == 1
    assert "at most 35 tokens" in caplog.text
    assert "has 36" in caplog.text


def test_bfloat16_weights_score_nearly_the_same(reward, checkpoint, tokenizer):
    half = ImageReward(checkpoint, tokenizer=tokenizer, dtype=torch.bfloat16)
    score = half(batch(), TEXTS).value
    assert score.dtype == torch.float32
    torch.testing.assert_close(score, reward(batch(), TEXTS).value, rtol=0, atol=0.05)


def test_safetensors_of_the_same_tensors_score_the_same(reward, checkpoint, tokenizer, tmp_path):
    from safetensors.torch import save_file

    save_file(torch.load(checkpoint, weights_only=True), tmp_path / "mine.safetensors")
    mine = ImageReward(tmp_path / "mine.safetensors", tokenizer=tokenizer)
    assert mine.name == "mine"
    torch.testing.assert_close(mine(batch(), TEXTS).value, reward(batch(), TEXTS).value, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"blip.visual_encoder.blocks.1.attn.qkv.bias": None},
            r"encoder\.layers\.1\.self_attn\.qkv\.bias.*none for 576",
        ),
        ({"blip.visual_encoder.blocks.0.norm3.bias": torch.zeros(192)}, r"norm3.*192 for none"),
        ({"blip.text_encoder.encoder.layer.0.output.dense.bias": torch.zeros(3)}, r"output\.dense\.bias.*3 for 128"),
        (
            {"blip.text_encoder.embeddings.word_embeddings.weight": None},
            "lacks what becomes embeddings.word_embeddings",
        ),
        ({"blip.visual_encoder.pos_embed": None}, "lacks what becomes embeddings.position_embedding"),
        ({"mlp.layers.0.weight": torch.zeros(1024, 64)}, "reads 64 numbers, and its text encoder makes 128"),
        ({"blip.text_encoder.embeddings.word_embeddings.weight": torch.zeros(20, 128)}, "the model knows 20"),
    ],
)
def test_another_checkpoint_is_refused(change, words, tokenizer, tmp_path):
    weights = random_checkpoint() | change
    torch.save({name: tensor for name, tensor in weights.items() if tensor is not None}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=words):
        ImageReward(tmp_path / "other.pt", tokenizer=tokenizer)


def test_a_tokenizer_without_its_words_is_refused(checkpoint, tmp_path):
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n")
    with pytest.raises(ValueError, match="vocabulary did not load"):
        ImageReward(checkpoint, tokenizer=tmp_path)
