"""The reference page's Quick Start, as printed, after `import llava15_fast`; only the two addresses are local."""

from pathlib import Path

import llava15_fast

ASSETS = Path(__file__).parents[2] / "assets"
SAMPLE = sorted((ASSETS / "samples").glob("*.png"))[0]


def test_quick_start():
    from transformers import AutoProcessor, LlavaOnevision1_5ForConditionalGeneration

    model_path = str(ASSETS / "scenes_checkpoint")

    # default: Load the model on the available device(s)
    model = LlavaOnevision1_5ForConditionalGeneration.from_pretrained(
        model_path, torch_dtype="auto", device_map="auto", trust_remote_code=True
    )

    # default processer
    processor = AutoProcessor.from_pretrained(model_path, trust_remote_code=True)

    messages = [
        {
            "role": "user",
            "content": [
                {
                    "type": "image",
                    "image": str(SAMPLE),
                },
                {"type": "text", "text": "Describe this image."},
            ],
        }
    ]

    # Preparation for inference
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    ).to(model.device)

    # Inference: Generation of the output
    generated_ids = model.generate(**inputs, max_new_tokens=1024)
    generated_ids_trimmed = [out_ids[len(in_ids) :] for in_ids, out_ids in zip(inputs.input_ids, generated_ids)]  # noqa: B905
    output_text = processor.batch_decode(generated_ids_trimmed, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    print(output_text)

    assert len(output_text) == 1 and len(output_text[0].split()) >= 3
    handle = llava15_fast.patch(model)
    assert generated_ids.equal(model.generate(**inputs, max_new_tokens=1024))
    assert handle.report().rows
