"""A push to the loopback Hub, and the model back from it."""

from hub_fixtures import publish

from vq4dit.hub import same_image


def test_a_pushed_model_is_complete_and_gives_the_same_image(hub, ann, quantized_folder):
    pushed = publish(quantized_folder, ann)
    files = hub.repos["ann/tiny"].head
    assert {"README.md", "model_index.json", "transformer/diffusion_pytorch_model.safetensors"} <= set(files)
    assert len(hub.repos["ann/tiny"].commits) == 2 and not pushed.was_there
    assert same_image(quantized_folder, pushed, ann)
