import pytest
import torch

from diffalign._compat import ensure_torchvision

LETTERS = sorted(set("a red green blue circle square two one big small left of right above the") - {" "})


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory):
    """A folder with a random CLIPModel of real classes, a tokenizer of 16 tokens and a processor of 32 pixels."""
    ensure_torchvision()
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    folder = tmp_path_factory.mktemp("models") / "tiny-clip"
    symbols = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *(f"{letter}</w>" for letter in LETTERS)]
    vocabulary = {symbol: index for index, symbol in enumerate(symbols)}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=16)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = tower | {"vocab_size": len(vocabulary), "max_position_embeddings": 16, "eos_token_id": 1, "bos_token_id": 0}
    vision = tower | {"image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # away from the near-constant network of the initialisation
    model.save_pretrained(folder)
    return folder
