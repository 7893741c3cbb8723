import pytest

from flplatform.admin.user_files import MAX_FILES, UserFiles, file_transfer
from flplatform.core.errors import (
    AlreadyExistsError,
    ConfigError,
    InvalidArgumentError,
    NotFoundError,
    ResourceExhaustedError,
)
from flplatform.core.messages import ModelRef
from flplatform.files.digest import digest_of


def ref(content: bytes) -> ModelRef:
    return ModelRef(digest_of(content), len(content))


def put(files: UserFiles, user: str, name: str, content: bytes) -> None:
    files.announce(user, name, ref(content))
    writer = files.store(user).receive(name, ref(content))
    if writer.offset < len(content):
        writer.write(content)
    writer.commit()


@pytest.fixture
def files(tmp_path):
    return UserFiles(tmp_path / "transfer", 100)


def test_what_is_uploaded_is_there_after_a_restart_and_is_its_owners(files, tmp_path):
    put(files, "amy", "data/a.txt", b"hello")
    files.announce("amy", "b.txt", ref(b"never sent"))
    again = UserFiles(tmp_path / "transfer", 100)
    assert [(each.name, each.blob.size, each.whole) for each in again.files("amy")] == [
        ("b.txt", 10, False),
        ("data/a.txt", 5, True),
    ]
    assert again.path(digest_of(b"hello")).read_bytes() == b"hello"
    assert again.files("lea") == []
    with pytest.raises(NotFoundError):
        again.file("lea", "data/a.txt")
    index = tmp_path / "transfer" / "amy" / "index.json"
    assert index.stat().st_mode & 0o777 == 0o600
    assert not list((tmp_path / "transfer").rglob("a.txt"))  # a name is never a file


def test_who_knows_a_digest_does_not_have_the_file(files):
    put(files, "amy", "a.txt", b"hello")
    files.announce("lea", "mine.txt", ref(b"hello"))
    assert not files.file("lea", "mine.txt").whole


def test_the_same_again_changes_nothing_and_another_is_refused(files):
    put(files, "amy", "a.txt", b"hello")
    files.announce("amy", "a.txt", ref(b"hello"))
    with pytest.raises(AlreadyExistsError, match=r"transfer/a\.txt exists"):
        files.announce("amy", "a.txt", ref(b"other"))
    for name in ("A.txt", "a.txt/b"):
        with pytest.raises(AlreadyExistsError, match="beside"):
            files.announce("amy", name, ref(b"other"))
    files.announce("amy", "c.txt", ref(b"never sent"))
    files.announce("amy", "c.txt", ref(b"what is sent"))
    assert files.file("amy", "c.txt").blob == ref(b"what is sent")


@pytest.mark.parametrize(
    "name", ["", "../x", "/x", "a/../b", ".x", "-x", "..%2fx", "%252e", "a\\b", "a\0", "x" * 256]
)
def test_odd_names_are_refused(files, name):
    with pytest.raises(InvalidArgumentError):
        files.announce("amy", name, ref(b"x"))


@pytest.mark.parametrize("user", ["..", "a/b", "", "AMY"])
def test_odd_users_have_no_folder(files, user):
    with pytest.raises(InvalidArgumentError):
        files.announce(user, "a.txt", ref(b"x"))


def test_the_quota_counts_from_the_announcement_and_per_user(files):
    files.announce("amy", "a", ModelRef("blake3:" + "1" * 64, 60))
    files.announce("lea", "a", ModelRef("blake3:" + "1" * 64, 100))
    with pytest.raises(ResourceExhaustedError, match="60 of 100") as caught:
        files.announce("amy", "b", ModelRef("blake3:" + "2" * 64, 41))
    assert caught.value.rule == "max_transfer_bytes"
    files.delete("amy", "a")
    files.announce("amy", "b", ModelRef("blake3:" + "2" * 64, 41))


def test_so_does_the_number_of_files(tmp_path, monkeypatch):
    monkeypatch.setattr("flplatform.admin.user_files.write_atomic", lambda *_: None)
    files = UserFiles(tmp_path, 1 << 30)
    for number in range(MAX_FILES):
        files.announce("amy", f"f{number}", ref(b"x"))
    with pytest.raises(ResourceExhaustedError, match="1000 files"):
        files.announce("amy", "one-more", ref(b"x"))


def test_deleting_frees_bytes_unless_another_name_has_them(files):
    put(files, "amy", "a.txt", b"hello")
    put(files, "amy", "b.txt", b"hello")
    files.delete("amy", "a.txt")
    assert files.file("amy", "b.txt").whole
    files.delete("amy", "b.txt")
    assert files.path(digest_of(b"hello")) is None
    with pytest.raises(NotFoundError):
        files.delete("amy", "b.txt")


def test_what_cannot_be_announced(files):
    with pytest.raises(InvalidArgumentError, match="empty"):
        files.announce("amy", "a", ModelRef(digest_of(b""), 0))
    with pytest.raises(InvalidArgumentError):
        files.announce("amy", "a", ModelRef("blake3:../../x", 1))


def test_a_damaged_index_is_named(files, tmp_path):
    files.announce("amy", "a", ref(b"x"))
    (tmp_path / "transfer" / "amy" / "index.json").write_text("{")
    with pytest.raises(ConfigError, match=r"index\.json"):
        UserFiles(tmp_path / "transfer", 100).files("amy")


def test_a_part_goes_with_its_announcement(files, tmp_path):
    blob = ref(b"in two parts")
    for end in (lambda: files.delete("amy", "a"), lambda: files.announce("amy", "a", ref(b"x"))):
        files.announce("amy", "a", blob)
        writer = files.store("amy").receive(file_transfer("amy", blob.digest), blob)
        writer.write(b"in two")
        writer.suspend()
        assert list(tmp_path.rglob("*.part"))
        end()
        assert not list(tmp_path.rglob("*.part"))


def test_bytes_without_a_name_are_swept(files, tmp_path):
    put(files, "amy", "a.txt", b"hello")
    writer = files.store("amy").receive("late", ref(b"late"))
    writer.write(b"late")
    writer.commit()
    again = UserFiles(tmp_path / "transfer", 100)
    assert again.store("amy").digests() == [digest_of(b"hello")]
