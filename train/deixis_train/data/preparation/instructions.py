"""What the text encoder is asked. The reference draws from 13 instructions for short captions and 11 for long ones.

Known here are the two that evaluation uses, which stand first; the others are our own. All are short: stage 1 keeps 8
context tokens.
"""

from __future__ import annotations

SHORT_CAPTION = (
    "A photo of ",
    "A picture of ",
    "An image of ",
    "A short caption: ",
    "A short image caption: ",
    "A short description: ",
    "Briefly describe the image: ",
    "Describe the picture in short: ",
    "Caption the image: ",
    "In one sentence: ",
    "The picture shows ",
    "What is in the image? ",
    "Summarize the photo: ",
)

LONG_CAPTION = (
    "A long image caption: ",
    "A long caption: ",
    "A long description: ",
    "A detailed caption: ",
    "A detailed image description: ",
    "Describe the image in detail: ",
    "Narrate the picture: ",
    "Tell everything you see: ",
    "Explain the photo at length: ",
    "What is where in the image? ",
    "The picture in many words: ",
)

REGION = ("an object of ",)
REFERRING = "where is "
