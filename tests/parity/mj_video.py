"""Scores of the authors' code of MJ-VIDEO against those in a folder, in an environment without diffalign.

    python -m venv ENV
    ENV/bin/pip install torch==2.13.0 transformers==4.45.2 'tokenizers<0.21' 'numpy<2.3' pillow sentencepiece protobuf
    ENV/bin/pip install einops timm requests regex
    ENV/bin/pip install --no-deps torchvision==0.28.0
    git clone https://github.com/aiming-lab/MJ-Video FOLDER/MJ-Video
    python -m tests.parity.mj_video_case FOLDER
    ENV/bin/python tests/parity/mj_video.py FOLDER

prints one JSON line. What is done to their code, all of it here and in memory:

- what it imports for downloads and video files, and is not installed, is an empty module;
- torchvision's missing schemas are declared where its wheel lies beside a torch without CUDA;
- decord's reader gives the frames of the folder, for there is no video file;
- the ids of the words that end a question are those of the folder's tokenizer, and the image size is that of its model;
- InternLM2's tokenizer is sentencepiece under transformers' own base class, as its repository has it.
"""

import json
import sys
import types
import warnings
from pathlib import Path

from beside import EmptyFinder, mend_torchvision

EMPTY = ("decord", "cv2", "av", "boto3")
SIZES = {0: range(5), 1: range(5, 11), 2: range(11, 16), 3: range(16, 23), 4: range(23, 28)}


def prepare(folder):
    """Makes their modules importable; a process group of one, which their forward pass asks for its rank."""
    warnings.simplefilter("ignore")
    import torch
    import transformers  # noqa: F401

    mend_torchvision()
    sys.meta_path.append(EmptyFinder(EMPTY))
    scripts = folder / "MJ-Video" / "scripts"
    sys.path[:0] = [str(scripts / "model"), str(scripts / "data_processor")]
    store = (folder / "rendezvous").absolute()
    store.unlink(missing_ok=True)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)


def load_tokenizer(base):
    """Sentencepiece with the marks of tokenizer_config.json."""
    import sentencepiece
    from transformers import AddedToken, PreTrainedTokenizer

    class Tokenizer(PreTrainedTokenizer):
        def __init__(self, **how):
            self.pieces = sentencepiece.SentencePieceProcessor(model_file=str(base / "tokenizer.model"))
            super().__init__(bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>", **how)

        @property
        def vocab_size(self):
            return self.pieces.get_piece_size()

        def get_vocab(self):
            return {self.pieces.id_to_piece(i): i for i in range(self.vocab_size)} | self.added_tokens_encoder

        def _tokenize(self, text):
            return self.pieces.encode(text, out_type=str)

        def _convert_token_to_id(self, token):
            return self.pieces.piece_to_id(token)

        def _convert_id_to_token(self, index):
            return self.pieces.id_to_piece(index)

        def build_inputs_with_special_tokens(self, ids, _=None):
            return [self.bos_token_id, *ids]

    marks = json.loads((base / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    return Tokenizer(added_tokens_decoder={int(index): AddedToken(**mark) for index, mark in marks.items()})


def load_model(folder, tokenizer):
    """(their network with the folder's weights, its config)."""
    import moe_reward
    from safetensors.torch import load_file

    base = str(folder / "base")
    moe_reward.token_pattern = tokenizer("<|im_end|><|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
    how = {"num_objectives": 28, "num_aspects": 5, "aspect2criteria": {key: [*value] for key, value in SIZES.items()}}
    how |= {"gating_temperature": 1.0, "gating_hidden_dim": 20, "gating_n_hidden": 3}
    config = moe_reward.InternVLChatRewardModelingConfig.from_pretrained(base, **how)
    model = moe_reward.InternVLChatRewardModeling(name=base, config=config)
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    model.config.pad_token_id = tokenizer.pad_token_id
    model.model.img_context_token_id = tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    return model.eval(), config


def load_frames(folder, name, size):
    """Pixels of a clip, by their own choice of frames and transforms."""
    import data
    import numpy as np

    frames = np.load(folder / f"{name}.npy")

    class Reader(list):
        def __init__(self, *_, **__):
            super().__init__(types.SimpleNamespace(asnumpy=lambda frame=frame: frame) for frame in frames)

        def get_avg_fps(self):
            return 8.0

    data.VideoReader, data.cpu = Reader, lambda _: None
    pixels, numbers = data.load_video(name, num_segments=8, max_num=1, input_size=size)
    return pixels, "".join(f"Frame{i + 1}: <image>\n" for i in range(len(numbers)))


def main():
    folder = Path(sys.argv[1])
    prepare(folder)
    import torch
    from internvl2 import prepare_chat_input

    case = json.loads((folder / "case.json").read_text())
    tokenizer = load_tokenizer(folder / "base")
    spelt = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in case["texts"]]
    model, config = load_model(folder, tokenizer)
    gaps, rows, theirs = [], [], {}
    for name, clip in case["clips"].items():
        pixels, prefix = load_frames(folder, name, config.force_image_size)
        ids, mask = prepare_chat_input(config, tokenizer, pixels, prefix + clip["prompt"], {})
        rows.append((pixels, ids[0], mask[0]))
        with torch.no_grad():
            output = model(pixels, ids, mask)
        theirs[name] = [*output.aspect_scores[0].tolist(), output.score.item()]
        gaps += [abs(a - b) for a, b in zip(theirs[name], clip["scores"], strict=True)]
    pixels, ids, mask = zip(*rows, strict=True)
    with torch.no_grad():
        ids = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=tokenizer.pad_token_id)
        together = model(torch.cat(pixels), ids, torch.nn.utils.rnn.pad_sequence(mask, batch_first=True)).score
    padded = max(abs(a - row[-1]) for a, row in zip(together.tolist(), theirs.values(), strict=True))
    same = sum(a == b for a, b in zip(spelt, case["tokens"], strict=True))
    print(json.dumps({"mj_video": max(gaps), "their batch": padded, "texts with equal tokens": same, "theirs": theirs}))


if __name__ == "__main__":
    main()
