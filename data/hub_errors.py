"""What may go wrong with the Hugging Face hub, in one sentence each."""

from collections.abc import Iterator
from contextlib import contextmanager

from utils import first_line

CONNECT_SECONDS = 10  # to the hub; its own client would try for half a minute


class HubUnreachable(OSError):
    """The hub does not answer; this says nothing about what it was asked for."""


@contextmanager
def hub_errors(what: str, *, absent: str) -> Iterator[None]:
    """The errors of huggingface_hub as OSErrors of one sentence about `what`.

    FileNotFoundError: it is not there, or not for this user; absent: what is said where there is no
    such repository. HubUnreachable: no answer. Errors of the disk stay as they are.
    """
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise FileNotFoundError(
            f"{what} asks for an agreement: accept it on its page, then `hf auth login`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise FileNotFoundError(f"{what}{absent}") from error
    except errors.RevisionNotFoundError as error:
        raise FileNotFoundError(f"{what}: no such branch, tag or commit") from error
    except (errors.HTTPError, errors.LocalEntryNotFoundError, ConnectionError) as error:
        raise HubUnreachable(f"{what}: the hub cannot be reached ({first_line(error)})") from error
