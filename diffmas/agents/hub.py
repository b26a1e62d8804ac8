"""Teams on the Hugging Face hub."""

from huggingface_hub import HfApi
from huggingface_hub.utils import validate_repo_id

from diffmas.agents import other_file
from diffmas.agents.card import is_here
from diffmas.agents.file import read_agents

__all__ = ["check_push", "push_to_hub"]


def push_to_hub(directory, repo: str, private: bool = True) -> str:
    """Uploads the directory of a team into a model repository of the hub, which it makes if there is none; returns its address.
    Raises ValueError for a name that is none, and for a base model that others cannot load."""
    described = read_agents(directory)
    check_push(repo, described["base_model"], other_file.base_models(directory, described["others"]))
    api = HfApi()
    address = api.create_repo(repo, private=private, exist_ok=True)
    api.upload_folder(repo_id=repo, folder_path=str(directory), commit_message="A team of diffmas")
    return str(address)


def check_push(repo: str, base: str | None, others: dict[str, str | None] | None = None) -> None:
    """Raises ValueError for what `push_to_hub` refuses. others: the base models of a team's other models, by their names."""
    try:
        validate_repo_id(repo)
    except ValueError as error:
        raise ValueError(f"repo: expected NAME or OWNER/NAME, of letters, digits, -, _ and ., got {repo!r}") from error
    for where, name in (("base", base), *((f"others, {name!r}: base", given) for name, given in (others or {}).items())):
        if not name or is_here(name):
            raise ValueError(f"{where}: expected a hub name to push to {repo}, since others do not have {name!r}")
