"""Questions and answers of GLaMM's training: lists of our own, of about the reference's sizes (section 10).

The first question of a list is the one that inference asks, to the letter (section 8).
"""

from __future__ import annotations

from collections.abc import Mapping

from deixis.conversation import IMAGE, MASK, REGION
from deixis_train.tasks import DESCRIBE, DESCRIBE_GROUNDED, DESCRIBE_REGION

SLOT = "{text}"  # the expression, the class, or what was asked
REGIONS = "{region}"  # "region1 <bbox>" in training; inference leaves the number out

GROUNDED_CAPTION = (
    DESCRIBE_GROUNDED,
    "Please describe the image in detail, and give a segmentation mask for every part of the answer that names one.",
    "What is in this picture? Answer with interleaved masks for the things that you mention.",
    "Write a thorough caption of the image and segment each phrase of it.",
    "Tell me what you see here; put a segmentation mask behind everything you name.",
    "Describe this scene, with a mask for each object or region in your description.",
)

CAPTION = (
    DESCRIBE,
    "What does the image show?",
    "Please describe this picture.",
    "Can you tell me what is happening in the image?",
    "Give a description of what you see.",
    "How would you caption this image?",
    "Write a caption for the picture.",
    "What is this a picture of?",
    "Summarize the content of the image.",
    "Please tell me what the photo contains.",
    "Describe the scene for somebody who cannot see it.",
    "What can be seen here?",
    "Explain the picture in a sentence or two.",
    "Would you describe the image for me?",
    "Say what the image is about.",
    "What are the contents of this photo?",
    "Please give a short account of the image.",
)

REGION_CAPTION = (
    DESCRIBE_REGION.replace(REGION, REGIONS),
    "What is in {region}?",
    "Please describe {region} of the image.",
    "What do you see inside {region}?",
    "Could you tell me what {region} shows?",
    "Give a description of the area marked by {region}.",
    "How would you describe {region}?",
    "What is the content of {region}?",
    "Say what can be found in {region}.",
    "Describe the part of the picture in {region}, please.",
    "Can you caption {region}?",
    "Please write a phrase about {region}.",
    "Tell me about {region}.",
    "What does {region} contain?",
    "I would like to know what {region} is.",
    "Which thing is in {region}?",
    "Explain what {region} of the photo depicts.",
    "Please name and describe what lies in {region}.",
    "What is shown in the box of {region}?",
    "Provide a caption for {region}.",
)

# The reference asks RefCOCO's regions in one fixed way, without the image sentence.
REGION_INTRODUCED = (
    f"{IMAGE}\nYou are given one region that holds one object, though the picture may show others as well. Say where "
    "the object is relative to the others and within the picture, and which basic attributes it has. {region}",
)

REGION_GROUP = (
    "Could you please describe the picture with these regions in mind: {region}?",
    "What do {region} have to do with each other?",
    "Please describe the image, given {region}.",
    "Give a caption that mentions what is in {region}.",
    "What is going on between {region}?",
    "Describe the scene that {region} belong to.",
    "How do {region} fit together?",
    "Write a sentence about the picture that covers {region}.",
    "Tell me what happens in {region}.",
    "Which scene do {region} show?",
    "Please explain {region} in one sentence.",
    "What can you say about {region} together?",
    "Caption the picture by way of {region}.",
    "Describe {region} and how they relate.",
    "What is the picture about, looking at {region}?",
    "Give me one description for all of {region}.",
    "Please sum up what {region} show.",
    "How are the things in {region} related?",
    "Write a caption of the image that {region} are taken from.",
    "What story do {region} tell?",
    "Look at {region}. What does the image show?",
    "Taking {region} into account, describe the picture.",
    "Please put {region} into one caption.",
    "With {region} given, what is the scene?",
    "What happens here, and what part do {region} play?",
    "Describe what is seen in {region} as a whole.",
    "Say in one sentence what {region} contain.",
    "Which relation holds between {region}?",
    "Please tell me about the scene around {region}.",
    "Combine {region} into a description of the picture.",
)

SEGMENT = (
    f"Can you segment the {SLOT} in this image?",
    f"Please segment {SLOT} in this image.",
    f"Where is {SLOT}? Answer with a segmentation mask.",
    f"Could you show me {SLOT} in the picture?",
    f"Find {SLOT} and give its mask.",
    f"What is {SLOT} in this image? Please respond with a segmentation mask.",
    f"Give me the mask of {SLOT}, please.",
    f"Segment {SLOT}.",
    f"Please mark {SLOT} in the photo.",
    f"I am looking for {SLOT}. Can you segment it?",
    f"Which pixels belong to {SLOT}?",
    f"Can you outline {SLOT} for me?",
    f"Please point out {SLOT} with a mask.",
    f"Would you cut out {SLOT}?",
    f"Locate {SLOT} and output the segmentation.",
    f"Show where {SLOT} is, as a mask.",
)

SEGMENT_ANSWERS = (
    f"Sure, it is {MASK}.",
    f"It is {MASK}.",
    f"Here is the mask: {MASK}.",
    f"Of course, {MASK}.",
    f"{MASK}.",
)

# By the task of a source; a recipe may name other questions (`instructions` of a source).
QUESTIONS: Mapping[str, tuple[str, ...]] = {
    "grounded_caption": GROUNDED_CAPTION,
    "caption": CAPTION,
    "region": REGION_CAPTION,
    "region_introduced": REGION_INTRODUCED,
    "region_group": REGION_GROUP,
    "refer": SEGMENT,
    "classes": SEGMENT,
    "ask": (f"{IMAGE}\n{SLOT}",),  # without the image sentence, as LLaVA's conversations are asked
}


def named_regions(first: int, count: int) -> str:
    """ "region1 <bbox>,region2 <bbox>": how boxes are named, from number `first` on."""
    return ",".join(f"region{number} {REGION}" for number in range(first, first + count))
