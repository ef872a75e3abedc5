"""The conversation that MJ-VIDEO reads, to the letter: the model knows no other text.

Data, from InternVL (conversation.py, template "internlm2-chat"; MIT licence, copyright (c) 2023 OpenGVLab), around the
frames as the authors of MJ-VIDEO write them. All frames stand in the place of the first; what marks the others stays
in the text as the letters <image>, for so their code fills it in, in training and after.
"""

IMAGE = "<IMG_CONTEXT>"
"""A token for each patch of an image stands in its place."""

START = (
    "<s><|im_start|>system\n"
    "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。"
    "<|im_end|>"
)

FRAMES = 8

USER = (
    f"<|im_start|>user\nFrame1: <img>{IMAGE}</img>\n"
    + "".join(f"Frame{number}: <image>\n" for number in range(2, FRAMES + 1))
    + "{prompt}"
)

ANSWER = "<|im_end|><|im_start|>assistant\n"
