"""Saved models without pickles: what :func:`load_without_trust` needs, and nothing that SB3 would unpickle."""

from __future__ import annotations

import io
import zipfile

from sb3_ppo_plus.errors import UntrustedFileError
from sb3_ppo_plus.saving.model_file import File
from sb3_ppo_plus.saving.state_dict_checks import OPTIMIZER_FILE, POLICY_FILE
from sb3_ppo_plus.saving.untrusted_model import DESCRIPTION, MAX_MEMBERS, MEMBERS
from sb3_ppo_plus.untrusted.safe_zip import opened_model, read_members

#: Members of a plain model, in the order in which they are written
PLAIN_MEMBERS = (DESCRIPTION, POLICY_FILE, OPTIMIZER_FILE, "_stable_baselines3_version", "system_info.txt")


def without_pickles(path: File) -> bytes:
    """Return a saved model as a zip that holds its description and its tensors only. ``PPOPlus.load`` reads it.

    The same model gives the same bytes.

    :param path: the model's file, which is not changed
    :raises UntrustedFileError: if it is damaged, or has no description because SB3 or an old PPOPlus saved it
    """
    with opened_model(path) as file:
        members = read_members(file, str(path), MEMBERS.__contains__, MAX_MEMBERS)
    if DESCRIPTION not in members:
        raise UntrustedFileError(f"{path} has no {DESCRIPTION}, so that only its pickles say what it is")
    plain = io.BytesIO()
    with zipfile.ZipFile(plain, "w") as archive:
        for name in PLAIN_MEMBERS:
            if name in members:
                # Without the time of writing
                archive.writestr(zipfile.ZipInfo(name), members[name])
    return plain.getvalue()


def is_without_pickles(path: File) -> bool:
    """Whether a file is a model of :func:`without_pickles`, so that there is nothing to trust.

    :param path: the file; for one that is no model, SB3's ``load`` has the error
    """
    try:
        with opened_model(path) as file, zipfile.ZipFile(file) as archive:
            members = archive.namelist()
    except (zipfile.BadZipFile, ValueError):
        return False
    return DESCRIPTION in members and "data" not in members
