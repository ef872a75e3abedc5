"""A local vision-language model against transformers' own processor and generation, and its gradients."""

import functools

import pytest
import torch

from diffalign import media
from diffalign.rewards import check_gradient
from diffalign.rewards.vlm import LocalVLM, PairwiseJudge, Question, Rating, YesLogit, qwen_patches
from tests.rewards.pictures import larger_pictures as pictures
from tests.rewards.tiny_vlm import save_llava, save_vlm, spelt_inputs

PROMPTS = ["a cat", "two dogs that run over a wide field", "x"]
KINDS = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("vlm")
    return functools.cache(lambda kind: save_llava(root / kind) if kind == "llava" else save_vlm(root / kind, kind))


@pytest.fixture
def judge(folders):
    return LocalVLM(folders("qwen2_5_vl"))


def generated_probabilities(folder, image, question):
    """The first token's distribution as transformers itself has it: its processor, template and generate."""
    from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

    model = AutoModelForImageTextToText.from_pretrained(folder)
    tokens = AutoTokenizer.from_pretrained(folder)
    if folder.name == "llava":
        content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
        inputs = AutoProcessor.from_pretrained(folder).apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            enable_thinking=False,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
    else:
        inputs = spelt_inputs(folder, image, question)
    output = model.generate(
        **inputs, max_new_tokens=1, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    return {tokens.decode([i]): p for i, p in enumerate(output.logits[0][0].softmax(dim=0).tolist())}


@pytest.mark.parametrize("kind", [*KINDS, "llava"])
def test_scores_equal_generation_by_transformers(folders, kind):
    judge = LocalVLM(folders(kind))
    assert judge.differentiable == (kind != "llava")
    # sizes that need no resize, where the backends of transformers differ by a level
    size = {"qwen3_vl": (96, 128), "llava": (28, 28)}.get(kind, (84, 112))
    images = list(pictures(3, *size))
    tensor = media.from_pil(images)
    chance = [
        generated_probabilities(folders(kind), image, f'Does this figure show "{prompt}"? Please answer Yes or No.')
        for image, prompt in zip(images, PROMPTS, strict=True)
    ]
    yes = torch.tensor([sum(p[word] for word in ("Yes", "yes", " Yes", "YES")) for p in chance])
    no = torch.tensor([sum(p[word] for word in ("No", "no", " No")) for p in chance])
    close = functools.partial(torch.testing.assert_close, rtol=2e-4, atol=1e-7)
    close(YesLogit(judge)(tensor, PROMPTS).value, yes)
    close(YesLogit(judge, score="renormalised")(tensor, PROMPTS).value, yes / (yes + no))
    close(YesLogit(judge, score="logit")(tensor, PROMPTS).value, (yes / no).log(), atol=1e-4)
    assert yes.std() > 1e-5  # the comparison would notice a mixed-up row
    rating = f'Rate "{PROMPTS[0]}"'
    levels = torch.tensor(
        [[p[digit] for digit in "12345"] for p in [generated_probabilities(folders(kind), images[0], rating)]]
    )
    expectation = (levels * torch.arange(1, 6)).sum() / levels.sum()
    close(Rating(judge, 'Rate "{prompt}"')(tensor[:1], PROMPTS[:1]).value[0], expectation, atol=1e-4)


@pytest.mark.parametrize("kind", [*KINDS, "llava"])
def test_padding_and_neighbours_do_not_change_a_score(folders, kind):
    judge = LocalVLM(folders(kind), batch_size=3)
    reward = YesLogit(judge, score="logit")
    images = media.from_pil(list(pictures()))
    together = reward(images, PROMPTS).value
    alone = torch.cat([reward(images[i : i + 1], PROMPTS[i : i + 1]).value for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=0, atol=5e-6)
    judge.batch_size = 2
    torch.testing.assert_close(together, reward(images, PROMPTS).value, rtol=0, atol=5e-6)


def test_images_of_several_sizes_stay_with_their_question(judge):
    big, small = (media.from_pil(list(pictures(2, *size)))[1] for size in [(84, 112), (56, 140)])
    questions = [Question((big, small), "Which?"), Question((small,), "This?"), Question((small, big), "Which?")]
    together = judge.log_probs(questions, ["1", "2"])
    torch.testing.assert_close(
        together, torch.cat([judge.log_probs([q], ["1", "2"]) for q in questions]), rtol=1e-5, atol=1e-5
    )
    assert (together[0] - together[2]).abs().max() > 1e-4


@pytest.mark.parametrize("size", [(84, 112), (60, 100), (20, 31), (333, 400), (30, 300), (200, 211)])
@pytest.mark.parametrize("edge", [14, 16])
def test_patches_equal_the_image_processor(size, edge, monkeypatch):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    bounds = {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 30}
    processor = Qwen2VLImageProcessorPil(size=bounds, patch_size=edge)
    images = list(pictures(2, *size))
    truth = processor(images, return_tensors="pt")
    tensors = media.from_pil(images).unbind()
    read = qwen_patches.QwenPatches.from_config(processor.to_dict())
    patches, grids = zip(*map(read, tensors), strict=True)
    assert torch.equal(torch.tensor(grids), truth["image_grid_thw"])
    error = (torch.cat(patches) - truth["pixel_values"]).abs().max()
    if size in HEIGHT_FIRST and error > 1e-5:  # newer Pillows, see media.resize: the order of the passes is all of it
        assert error < 2.5 / 255 / min(read.std)
        monkeypatch.setattr(qwen_patches, "resize", height_first)
        error = (torch.cat([read(image)[0] for image in tensors]) - truth["pixel_values"]).abs().max()
    assert error < 1e-5


HEIGHT_FIRST = [(60, 100), (30, 300)]  # the height shrinks and the width grows


def height_first(image, size, filter):
    return media.resize(media.resize(image, (size[0], image.shape[-1]), filter), size, filter)


def test_an_image_that_the_family_refuses(judge):
    score = YesLogit(judge)(torch.rand(1, 3, 2, 500), ["x"])
    assert "more than 200 times" in score.reasons[0]


def unrounded(monkeypatch):
    monkeypatch.setattr(qwen_patches, "resize", functools.partial(media.resize, rounding=False))


def test_patches_have_the_gradient_of_finite_differences(monkeypatch):
    unrounded(monkeypatch)
    patches = qwen_patches.QwenPatches(2, 2, 2, 16, 64, "bicubic", (0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
    image = torch.rand(3, 5, 13, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert patches(image)[0].shape == (12, 24)  # 4 x 12 pixels
    assert torch.autograd.gradcheck(lambda x: patches(x)[0], image.requires_grad_())


@pytest.mark.parametrize("kind", KINDS)
def test_scores_have_the_gradient_of_finite_differences(folders, kind, monkeypatch):
    """Along the gradient and along a random direction; rounding is off, for a staircase has no other gradient."""
    unrounded(monkeypatch)
    # float64 outside: the norms of these models are float32 whatever the weights are, which bounds the agreement
    reward = YesLogit(LocalVLM(folders(kind), dtype=torch.float64), score="logit")
    generator = torch.Generator().manual_seed(1)
    image = torch.rand(1, 3, 60, 90, dtype=torch.float64, generator=generator).mul(0.8).add(0.1)
    leaf = image.clone().requires_grad_()
    gradient = torch.autograd.grad(reward(leaf, ["a cat"]).value.sum(), leaf)[0]
    for direction in (gradient, torch.randn(image.shape, dtype=torch.float64, generator=generator)):
        unit = direction / direction.abs().max()
        ends = [reward(image + sign * 2e-3 * unit, ["a cat"]).value for sign in (1, -1)]
        slope = (ends[0] - ends[1]).item() / 4e-3
        assert slope == pytest.approx((gradient * unit).sum().item(), rel=5e-3, abs=1e-4)
    assert gradient.abs().max() > 1e-4


def test_the_rounding_lets_the_gradient_through(judge, monkeypatch):
    """Where the pixels are 8-bit and nothing is resized, rounding changes no value, so the gradients must be equal."""
    images = media.from_pil(list(pictures(2)))
    reward = YesLogit(judge, score="logit")

    def gradient():
        leaf = images.clone().requires_grad_()
        return torch.autograd.grad(reward(leaf, PROMPTS[:2]).value.sum(), leaf)[0]

    rounded = gradient()
    unrounded(monkeypatch)
    torch.testing.assert_close(rounded, gradient(), rtol=1e-4, atol=1e-7)
    assert check_gradient(reward, images, PROMPTS[:2]).min() > 0


def test_one_bad_image_costs_its_own_score(judge):
    images = media.from_pil(list(pictures()))
    whole = YesLogit(judge)(images, PROMPTS).value
    images[1, 0, 3, 3] = torch.nan
    score = YesLogit(judge)(images, PROMPTS)
    assert score.valid.tolist() == [True, False, True]
    torch.testing.assert_close(score.value[::2], whole[::2])


def test_thinking_is_off_or_the_model_is_refused(judge):
    question = Question((torch.rand(3, 56, 56),), "Well?")
    assert "THINKS" not in judge._text(question)
    judge.processor.chat_template = judge.processor.chat_template.replace("assistant\n", "assistant\n<think>\n")
    with pytest.raises(ValueError, match="thinks before it answers"):
        judge.log_probs([question], ["yes"])


def test_words_in_every_spelling(judge):
    tokens = judge.processor.tokenizer
    assert [tokens.decode([i]) for i in judge.word_tokens("YES")] == ["Yes", "yes", " Yes", "YES"]
    assert [tokens.decode([i]) for i in judge.word_tokens("3")] == ["3"]
    with pytest.raises(ValueError, match="no token 'maybe'"):
        judge.log_probs([Question((torch.rand(3, 56, 56),), "Well?")], ["maybe"])


def test_a_prompt_that_spells_an_image(judge):
    score = YesLogit(judge)(torch.rand(2, 3, 56, 56), ["a cat", "<|image_pad|>"])
    assert score.valid.tolist() == [True, False]
    assert "has <|image_pad|> in its text" in score.reasons[1]


def test_a_local_model_judges_pairs(judge):
    images = media.from_pil(list(pictures()))
    score = PairwiseJudge(judge)(images, ["a cat"] * 3)
    assert score.valid.all()
    assert score.value.mean().item() == pytest.approx(0.5, abs=1e-6)  # what one wins another loses
    assert score.value.std() > 1e-4


def test_weights_that_lack_a_tensor_are_refused(folders, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = save_llava(tmp_path / "broken")
    weights = load_file(folder / "model.safetensors")
    del weights[next(iter(name for name in weights if "lm_head" in name))]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks 1 weights"):
        LocalVLM(folder)
