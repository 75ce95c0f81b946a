"""Signed versions: whose word a reader takes, what an attacker who can write to the store still cannot do, and keys."""

import json
import logging
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import synthetic
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from test_agent import Bench

from publisher.epochs import Claim
from shared import console
from shared.catalog import Catalog
from shared.errors import Corrupt, Untrusted, UsageError
from shared.layout import Layout
from shared.manifest import Manifest, Signature
from shared.signing import CONTEXT, load_seal, load_trust
from shared.store import Store
from shared.stores import open_store
from shared.versions import Version

LAYOUT = Layout(synthetic.ADAPTER)
CLAIM = Claim(1, "0123456789ab")
PKCS8 = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
PUBLIC = (serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def write_keys(folder: Path, name: str) -> tuple[Path, Path]:
    """(private, public) key files."""
    private = Ed25519PrivateKey.generate()
    sign, trust = folder / f"{name}-sign.pem", folder / f"{name}-trust.pem"
    sign.write_bytes(private.private_bytes(*PKCS8))
    sign.chmod(0o600)
    trust.write_bytes(private.public_key().public_bytes(*PUBLIC))
    return sign, trust


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("keys")


@pytest.fixture(scope="module")
def ours(folder: Path) -> tuple[Path, Path]:
    return write_keys(folder, "ours")


@pytest.fixture(scope="module")
def theirs(folder: Path) -> tuple[Path, Path]:
    return write_keys(folder, "theirs")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return synthetic.write_base(tmp_path / "base")


@pytest.fixture
def store(tmp_path: Path, base: Path, ours: tuple[Path, Path]) -> Store:
    """Versions 0 and 1, signed by us, free to be damaged."""
    store = open_store(str(tmp_path / "store"))
    synthetic.publish(store, base, count=2, seal=load_seal(str(ours[0])))
    return store


def read(store: Store, trust: Path | str | None, number: int = 1, adapter: str = synthetic.ADAPTER) -> Manifest:
    return Catalog(store, adapter, load_trust([str(trust)] if trust else [])).manifest(Version(1, number))


def test_what_is_published_with_a_key_is_taken_by_those_who_trust_it_and_by_those_who_ask_for_none(
    store: Store, ours: tuple[Path, Path]
):
    signed = read(store, ours[1])
    assert signed.signature is not None
    assert signed == read(store, None)
    assert Manifest.parse(signed.to_bytes(), key="k") == signed


def test_the_signature_is_plain_ed25519_over_the_context_and_the_digest_in_hex(store: Store, ours: tuple[Path, Path]):
    signed = read(store, None)
    public = serialization.load_pem_public_key(ours[1].read_bytes())
    assert signed.signature is not None
    public.verify(bytes.fromhex(signed.signature.ed25519), CONTEXT + signed.digest.encode())  # type: ignore[union-attr, call-arg, arg-type]


def test_the_digest_does_not_cover_the_signature_so_children_of_either_name_the_same_parent(store: Store):
    signed = read(store, None)
    unsigned = replace(signed, signature=None).sealed()
    assert (unsigned.digest, unsigned.to_bytes() == signed.to_bytes()) == (signed.digest, False)


def test_ranks_with_one_key_sign_the_same_bytes(store: Store, ours: tuple[Path, Path]):
    unsigned = replace(read(store, None), signature=None)
    once, again = load_seal(str(ours[0])), load_seal(str(ours[0]))
    assert once(unsigned).to_bytes() == again(unsigned).to_bytes() == read(store, None).to_bytes()


def unsigned(manifest: Manifest, _other: Manifest, _theirs: Path) -> Manifest:
    return replace(manifest, signature=None)


def signed_by_another(manifest: Manifest, _other: Manifest, theirs: Path) -> Manifest:
    return load_seal(str(theirs))(replace(manifest, signature=None))


def signed_by_another_in_our_name(manifest: Manifest, other: Manifest, theirs: Path) -> Manifest:
    forged = signed_by_another(manifest, other, theirs)
    assert forged.signature and manifest.signature
    return replace(forged, signature=replace(forged.signature, key=manifest.signature.key))


def signature_of_another_version(manifest: Manifest, other: Manifest, _theirs: Path) -> Manifest:
    return replace(manifest, signature=other.signature)


def changed_and_sealed_anew(manifest: Manifest, _other: Manifest, _theirs: Path) -> Manifest:
    return replace(manifest, training={**manifest.training, "step": 99}).sealed()


def data_of_another_version(manifest: Manifest, other: Manifest, _theirs: Path) -> Manifest:
    return replace(manifest, shards=other.shards).sealed()


def one_bit_of_the_signature(manifest: Manifest, _other: Manifest, _theirs: Path) -> Manifest:
    assert manifest.signature
    flipped = bytes([bytes.fromhex(manifest.signature.ed25519)[0] ^ 1]).hex() + manifest.signature.ed25519[2:]
    return replace(manifest, signature=replace(manifest.signature, ed25519=flipped))


def signature_of_nothing(manifest: Manifest, _other: Manifest, _theirs: Path) -> Manifest:
    assert manifest.signature
    return replace(manifest, signature=Signature(manifest.signature.key, "0" * 128))


@pytest.mark.parametrize(
    ("forge", "says"),
    [
        (unsigned, "not signed"),
        (signed_by_another, "which is not trusted"),
        (signed_by_another_in_our_name, "does not fit"),
        (signature_of_another_version, "does not fit"),
        (changed_and_sealed_anew, "does not fit"),
        (data_of_another_version, "does not fit"),
        (one_bit_of_the_signature, "does not fit"),
        (signature_of_nothing, "does not fit"),
    ],
)
def test_what_no_trusted_key_signed_is_refused_with_trust_and_taken_without(
    store: Store, ours: tuple[Path, Path], theirs: tuple[Path, Path], forge, says: str
):
    forged = forge(read(store, None, 1), read(store, None, 0), theirs[0])
    store.put(LAYOUT.manifest(Version(1, 1)), forged.to_bytes())
    assert read(store, None) == forged
    with pytest.raises(Untrusted, match=says) as caught:
        read(store, ours[1])
    assert (caught.value.exit_code, caught.value.version, caught.value.retryable) == (4, "0001-000001", False)
    assert caught.value.key == LAYOUT.manifest(Version(1, 1))


def test_a_signed_version_under_another_number_or_adapter_is_refused(store: Store, ours: tuple[Path, Path]):
    content = read(store, None, 0).to_bytes()
    store.put(LAYOUT.manifest(Version(1, 7)), content)
    store.put(Layout("other").manifest(Version(1, 0)), content)
    with pytest.raises(Corrupt, match="names policy@0001-000000"):
        read(store, ours[1], 7)
    with pytest.raises(Corrupt, match="names policy@0001-000000"):
        read(store, ours[1], 0, adapter="other")


@pytest.mark.parametrize("damage", ["key", "ed25519"])
@pytest.mark.parametrize("text", ["", "0", "G" * 128, "A" * 16, "a" * 17, " " * 128])
def test_a_signature_that_is_not_lower_case_hex_of_its_length_is_corrupt(store: Store, damage: str, text: str):
    signed = read(store, None)
    assert signed.signature
    bad = replace(signed, signature=replace(signed.signature, **{damage: text}))
    with pytest.raises(Corrupt, match="malformed"):
        Manifest.parse(bad.to_bytes(), key="k")


def test_the_agent_keeps_the_last_version_that_a_trusted_key_signed_and_says_why(
    tmp_path: Path, ours: tuple[Path, Path]
):
    bench = Bench(tmp_path)
    bench.publisher.close()
    bench.catalog = Catalog(bench.store, synthetic.ADAPTER, load_trust([str(ours[1])]))
    bench.publisher = synthetic.open_publisher(bench.store, bench.base, CLAIM, seal=load_seal(str(ours[0])))
    good, bad = bench.publish(0), bench.publish(1)
    forged = replace(Catalog(bench.store, synthetic.ADAPTER).manifest(bad), signature=None)
    bench.store.put(LAYOUT.manifest(bad), forged.to_bytes())
    bench.agent = bench.new_agent()
    for _ in range(6):
        bench.agent.tick()
    assert (bench.serving, bench.agent.quarantined) == (good, {bad})
    assert "not signed" in bench.agent.health.last_error
    bench.publish(2)
    bench.agent.tick()
    assert bench.serving == Version(1, 2)


def lorasync(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = console.main(words)
    said = capsys.readouterr()
    return code, said.out, said.err


def test_every_command_that_reads_versions_refuses_what_no_trusted_key_signed(
    store: Store, tmp_path: Path, ours: tuple[Path, Path], theirs: tuple[Path, Path], capsys
):
    for trust, right in ((ours[1], True), (theirs[1], False)):
        flags = ("--store", store.url, "--trust", str(trust))
        code, out, _ = lorasync(capsys, "versions", *flags, "--json")
        assert (code, ["corrupt" in row for row in json.loads(out)]) == ((0, [False] * 2) if right else (4, [True] * 2))
        code, out, _ = lorasync(capsys, "verify", "--all", *flags, "--json")
        assert (code, [row["ok"] for row in json.loads(out)]) == ((0, [True] * 2) if right else (4, [False] * 2))
        code, _, err = lorasync(capsys, "export", "latest", *flags, "--out", str(tmp_path / f"out-{right}"))
        assert (code, "Untrusted" in err) == ((0, False) if right else (4, True))
        assert (tmp_path / f"out-{right}").exists() == right
        assert lorasync(capsys, "status", *flags, "--json")[0] == 0
    both = ("--trust", str(theirs[1]), "--trust", str(ours[1]))
    assert lorasync(capsys, "verify", "--all", "--store", store.url, *both)[0] == 0


def test_a_rollback_signs_the_new_version_and_signs_nothing_that_its_own_key_did_not_sign_before(
    store: Store, ours: tuple[Path, Path], theirs: tuple[Path, Path], capsys
):
    goes_back = ("rollback", "0001-000000", "--yes", "--store", store.url)
    code, _, err = lorasync(capsys, *goes_back)
    assert (code, "Give --sign-key" in err) == (2, True)
    code, _, err = lorasync(capsys, *goes_back, "--sign-key", str(theirs[0]))
    assert (code, "Untrusted" in err) == (4, True)
    genuine = store.get(LAYOUT.manifest(Version(1, 0)))
    forged = replace(read(store, None, 0), training={"step": 0}, signature=None).sealed()
    store.put(LAYOUT.manifest(Version(1, 0)), forged.to_bytes())
    code, _, err = lorasync(capsys, *goes_back, "--sign-key", str(ours[0]))
    assert (code, "not signed" in err) == (4, True)
    assert [entry.key for entry in store.list(LAYOUT.epochs)] == [LAYOUT.epoch(1)]  # nobody was fenced
    store.put(LAYOUT.manifest(Version(1, 0)), genuine)
    assert lorasync(capsys, *goes_back, "--sign-key", str(ours[0]))[0] == 0
    assert Catalog(store, synthetic.ADAPTER, load_trust([str(ours[1])])).manifest(Version(2, 0)).signature is not None
    assert lorasync(capsys, "verify", "--all", "--store", store.url, "--trust", str(ours[1]))[0] == 0


def test_the_configuration_names_trusted_keys_too_and_the_flag_wins(
    store: Store, tmp_path: Path, ours: tuple[Path, Path], theirs: tuple[Path, Path], capsys
):
    file = tmp_path / "run.toml"
    file.write_text(f'[store]\nurl = "{store.url}"\ntrust = ["{theirs[1]}"]\n')
    assert lorasync(capsys, "verify", "--config", str(file))[0] == 4
    assert lorasync(capsys, "verify", "--config", str(file), "--trust", str(ours[1]))[0] == 0


def test_a_version_signed_after_signing_was_switched_on_is_whole_though_its_parent_is_not_signed(
    tmp_path: Path, base: Path, ours: tuple[Path, Path], capsys
):
    store = open_store(str(tmp_path / "mixed"))
    first, second = synthetic.publish(store, base, count=2)
    store.put(LAYOUT.manifest(second.version), load_seal(str(ours[0]))(second).to_bytes())
    flags = ("--store", store.url, "--trust", str(ours[1]))
    assert lorasync(capsys, "verify", str(second.version), *flags)[0] == 0
    assert lorasync(capsys, "verify", str(first.version), *flags)[0] == 4


def test_no_unsigned_rollback_to_a_version_from_before_signing_was_switched_on(
    tmp_path: Path, base: Path, ours: tuple[Path, Path], capsys
):
    store = open_store(str(tmp_path / "mixed"))
    first, second = synthetic.publish(store, base, count=2)
    store.put(LAYOUT.manifest(second.version), load_seal(str(ours[0]))(second).to_bytes())
    code, _, err = lorasync(capsys, "rollback", str(first.version), "--yes", "--store", store.url)
    assert (code, f"{second.version} is signed" in err, "Give --sign-key" in err) == (2, True, True)
    assert [entry.key for entry in store.list(LAYOUT.epochs)] == [LAYOUT.epoch(1)]  # nobody was fenced
    store.put(LAYOUT.manifest(second.version), second.to_bytes())  # switched off again
    assert lorasync(capsys, "rollback", str(first.version), "--yes", "--store", store.url)[0] == 0


@pytest.mark.parametrize("flag", ["--trust", "--sign-key"])
def test_a_flag_that_names_no_key_is_refused_for_it_would_switch_the_check_off(flag: str, capsys):
    command = "verify" if flag == "--trust" else "train"
    with pytest.raises(SystemExit) as caught:
        console.main([command, "--store", "/nowhere", flag, ""])
    assert caught.value.code == 2 and "is empty" in capsys.readouterr().err


def raw_hex(trust: Path) -> str:
    public = serialization.load_pem_public_key(trust.read_bytes())
    return public.public_bytes_raw().hex()  # type: ignore[union-attr]


def test_trusted_keys_are_read_from_a_file_of_several_a_directory_or_hex(
    store: Store, tmp_path: Path, ours: tuple[Path, Path], theirs: tuple[Path, Path]
):
    several, directory = tmp_path / "several.pem", tmp_path / "keys"
    several.write_bytes(b"theirs\n" + theirs[1].read_bytes() + b"ours\n" + ours[1].read_bytes())
    directory.mkdir()
    shutil.copy(ours[1], directory / "a.pem")
    (directory / "README").write_text("not a key")
    for place in (several, directory, raw_hex(ours[1]), raw_hex(ours[1]).upper()):
        assert read(store, place).version == Version(1, 1)
    with pytest.raises(Untrusted):
        read(store, raw_hex(theirs[1]))


def test_who_signs_again_trusts_their_own_key(store: Store, ours: tuple[Path, Path], theirs: tuple[Path, Path]):
    for key, right in ((ours[0], True), (theirs[0], False)):
        trust = load_trust([], sign_key=str(key))
        assert trust is not None
        if right:
            trust.demand_signed(read(store, None), key="k")
        else:
            with pytest.raises(Untrusted):
                trust.demand_signed(read(store, None), key="k")
    assert load_trust([]) is None


def test_what_is_no_key_is_a_usage_error_that_says_how_to_make_one(tmp_path: Path, ours: tuple[Path, Path]):
    elliptic = generate_private_key(SECP256R1())
    (tmp_path / "elliptic.pem").write_bytes(elliptic.private_bytes(*PKCS8))
    (tmp_path / "elliptic.pub.pem").write_bytes(elliptic.public_key().public_bytes(*PUBLIC))
    locked = (*PKCS8[:2], serialization.BestAvailableEncryption(b"secret"))
    (tmp_path / "locked.pem").write_bytes(Ed25519PrivateKey.generate().private_bytes(*locked))
    (tmp_path / "text.pem").write_text("hello")
    (tmp_path / "torn.pem").write_bytes(ours[1].read_bytes().replace(b"MC", b"XX"))
    (tmp_path / "empty").mkdir()
    for name, says in (
        ("nothing.pem", "no such file"),
        ("text.pem", "openssl genpkey"),
        ("elliptic.pem", "not an ed25519 key"),
        ("locked.pem", "Password was not given|encrypted"),
        ("empty", "no such file"),
    ):
        with pytest.raises(UsageError, match=says):
            load_seal(str(tmp_path / name))
    for place, says in (
        (str(tmp_path / "nothing.pem"), "no such file"),
        (str(tmp_path / "text.pem"), "-pubout"),
        (str(ours[0]), "-pubout"),
        (str(tmp_path / "elliptic.pub.pem"), "not an ed25519 key"),
        (str(tmp_path / "torn.pem"), "no PEM public key"),
        (str(tmp_path / "empty"), "trusts anyone"),
        ("", "no such file"),
        ("ab" * 31, "no such file"),
    ):
        with pytest.raises(UsageError, match=says):
            load_trust([place])


def test_a_private_key_that_others_can_read_is_told_of(
    tmp_path: Path, ours: tuple[Path, Path], caplog: pytest.LogCaptureFixture
):
    key = tmp_path / "sign.pem"
    shutil.copy(ours[0], key)
    for mode, told in ((0o600, False), (0o640, True), (0o604, True)):
        key.chmod(mode)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            load_seal(str(key))
        assert ("may be read by others" in caplog.text) == told


def test_without_the_package_a_key_is_a_usage_error_that_names_the_extra(
    ours: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
):
    for name in [name for name in sys.modules if name.split(".")[0] == "cryptography"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "cryptography", None)
    assert load_seal("") == Manifest.sealed and load_trust([]) is None
    with pytest.raises(UsageError, match=r"lorasync\[sign\]"):
        load_seal(str(ours[0]))
    with pytest.raises(UsageError, match=r"lorasync\[sign\]"):
        load_trust([str(ours[1])])


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
def test_keys_are_made_with_openssl_as_the_module_says(tmp_path: Path, base: Path):
    from shared import signing

    lines = [line.partition("#")[0].split() for line in (signing.__doc__ or "").splitlines()]
    for words in (words for words in lines if words[:1] == ["openssl"]):
        subprocess.run(words, cwd=tmp_path, check=True, capture_output=True, timeout=60)
    store = open_store(str(tmp_path / "store"))
    synthetic.publish(store, base, seal=load_seal(str(tmp_path / "sign.pem")))
    assert read(store, tmp_path / "trust.pem", 0).signature is not None
