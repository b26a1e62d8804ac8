"""Teams on the Hugging Face hub."""

from huggingface_hub import HfApi
from huggingface_hub.utils import validate_repo_id

from diffmas.agents.card import is_here
from diffmas.agents.file import read_agents

__all__ = ["check_push", "push_to_hub"]


def push_to_hub(directory, repo: str, private: bool = True) -> str:
    """Uploads the directory of a team into a model repository of the hub, which it makes if there is none; returns its address.
    Raises ValueError for a name that is none, and for a base model that others cannot load."""
    check_push(repo, read_agents(directory)["base_model"])
    api = HfApi()
    address = api.create_repo(repo, private=private, exist_ok=True)
    api.upload_folder(repo_id=repo, folder_path=str(directory), commit_message="A team of diffmas")
    return str(address)


def check_push(repo: str, base: str | None) -> None:
    """Raises ValueError for what `push_to_hub` refuses."""
    validate_repo_id(repo)
    if not base or is_here(base):
        raise ValueError(f"base: expected a hub name to push to {repo}, since others do not have {base!r}")
