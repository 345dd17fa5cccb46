"""Federation files: what is written is read again; what can't be is refused with the fix."""

from __future__ import annotations

import dataclasses
import datetime as dt
import socket
import stat

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from plait.config import Config, Machine
from plait.peers.certificates import (
    federation_toml,
    free_ports,
    init_federation,
    make_authority,
    metrics_addresses,
    write_secret,
)
from plait.peers.credentials import Pair, read_credentials
from plait.peers.federation import (
    Federation,
    Limits,
    Member,
    load_federation,
    load_peer,
    split_address,
)

CONFIG = Config(rounds=3, topology="ring", method="ffa", task="demo")
PEERS = (Member(name="a", address="10.0.0.1:7600"), Member(name="b", address="[::1]:7600"))


def federation(**change) -> Federation:
    values = {"id": "f", "config": dataclasses.replace(CONFIG, clients=2), "peers": PEERS}
    return Federation(**(values | change))


@pytest.fixture
def files(tmp_path):
    return init_federation(tmp_path / "f", ["ann", "bob"], CONFIG)


# -- init


def test_what_is_written_is_read_again(tmp_path):
    limits = Limits(round_timeout_s=5, norm_bound=2.5, symmetric_loss=True)
    path = init_federation(
        tmp_path / "f", ["ann", "bob"], CONFIG, federation_id="x", limits=limits,
        labels=["no", "yes"], addresses=["127.0.0.1:7600", "bob.example.org:7601"],
    )  # fmt: skip
    read = load_federation(path)
    assert read.id == "x"
    assert read.config == dataclasses.replace(CONFIG, clients=2)
    assert read.limits == limits
    assert read.labels == ("no", "yes")
    assert [(p.name, p.address) for p in read.peers] == [
        ("ann", "127.0.0.1:7600"),
        ("bob", "bob.example.org:7601"),
    ]
    settings = load_peer(path, "bob")
    assert settings.listen == "0.0.0.0:7601"
    assert load_peer(path, "ann").listen == "127.0.0.1:7600"
    assert settings.out.resolve() == path.parent / "bob" / "out"
    assert settings.apply(read.config) == read.config
    read_credentials(settings)


def test_any_federation_is_read_as_it_is_written(tmp_path):
    late = dataclasses.replace(PEERS[1], joins=3, leaves=9)
    written = federation(id='quo"te\\', peers=(PEERS[0], late), labels=("no", "yes"))
    path = tmp_path / "federation.toml"
    path.write_text(federation_toml(written), encoding="utf-8")
    assert load_federation(path) == written


def test_keys_are_for_their_owner_only(files):
    for key in (files.parent / "ca.key", files.parent / "ann" / "key.pem"):
        assert stat.S_IMODE(key.stat().st_mode) == 0o600


def test_a_certificate_is_for_a_server_and_a_client_of_that_name(files):
    certificate = x509.load_pem_x509_certificate((files.parent / "ann" / "cert.pem").read_bytes())
    get = certificate.extensions.get_extension_for_class
    assert get(x509.SubjectAlternativeName).value.get_values_for_type(x509.DNSName) == ["ann"]
    assert [usage.dotted_string for usage in get(x509.ExtendedKeyUsage).value] == [
        x509.ExtendedKeyUsageOID.SERVER_AUTH.dotted_string,
        x509.ExtendedKeyUsageOID.CLIENT_AUTH.dotted_string,
    ]
    assert not get(x509.BasicConstraints).value.ca
    authority = x509.load_pem_x509_certificate((files.parent / "ca.pem").read_bytes())
    certificate.verify_directly_issued_by(authority)
    assert certificate.not_valid_after_utc - dt.datetime.now(dt.UTC) > dt.timedelta(days=364)


def test_a_folder_in_use_is_left_alone(files):
    with pytest.raises(ValueError, match="not an empty folder"):
        init_federation(files.parent, ["a", "b"], CONFIG)


def test_free_ports_are_different_and_free(monkeypatch):
    assert len(set(free_ports(20))) == 20
    (taken, free) = free_ports(2)
    monkeypatch.setattr("plait.peers.certificates.PORTS", [taken, free])
    with socket.socket() as one:
        one.bind(("127.0.0.1", taken))
        one.listen()
        assert free_ports(2) == [free]


# -- credentials


def test_there_is_no_peer_without_its_files(files):
    settings = load_peer(files, "ann")
    for path in (settings.key, settings.certificate, settings.ca):
        path.unlink()
        with pytest.raises(ValueError, match=f"{path.name} is missing"):
            read_credentials(settings)


def authority_of(files) -> Pair:
    return Pair((files.parent / "ca.pem").read_bytes(), (files.parent / "ca.key").read_bytes())


def signed(files, name="ann", usages=None, extended=None, key=None, by=None, **span) -> Pair:
    """A certificate that is good but for what is given."""
    authority, key = by or authority_of(files), key or ec.generate_private_key(ec.SECP256R1())
    now, day = dt.datetime.now(dt.UTC), dt.timedelta(days=1)
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)]))
        .issuer_name(x509.load_pem_x509_certificate(authority.certificate).subject)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now + span.get("begin", -1) * day)
        .not_valid_after(now + span.get("end", 30) * day)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
    )
    if extended:
        builder = builder.add_extension(x509.ExtendedKeyUsage(extended), critical=False)
    if usages:
        builder = builder.add_extension(usages, critical=True)
    signer = serialization.load_pem_private_key(authority.key, None)
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    return Pair(
        builder.sign(signer, hashes.SHA256()).public_bytes(pem),
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain),
    )


def authority(*more: x509.ExtensionType, above: Pair | None = None, begin=-1, end=30) -> Pair:
    """An authority with some extensions, of its own or signed by another one."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name(
        [x509.NameAttribute(x509.NameOID.COMMON_NAME, f"authority {begin}{bool(above)}")]
    )
    now, day = dt.datetime.now(dt.UTC), dt.timedelta(days=1)
    issuer = x509.load_pem_x509_certificate(above.certificate).subject if above else name
    builder = x509.CertificateBuilder(
        issuer, name, key.public_key(), 1, now + begin * day, now + end * day
    ).add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    for extension in more:
        builder = builder.add_extension(extension, critical=True)
    signer = serialization.load_pem_private_key(above.key, None) if above else key
    plain = serialization.NoEncryption()
    return Pair(
        builder.sign(signer, hashes.SHA256()).public_bytes(PEM),
        key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, plain),
    )


def under(files, above: Pair) -> Pair:
    """A certificate of another authority, whose own is in the files."""
    load_peer(files, "ann").ca.write_bytes(above.certificate)
    return signed(files, by=above)


def key_as(data: bytes, encoding, encryption=None) -> bytes:
    key = serialization.load_pem_private_key(data, None)
    plain = encryption or serialization.NoEncryption()
    return key.private_bytes(encoding, serialization.PrivateFormat.PKCS8, plain)


def no_signature() -> x509.KeyUsage:
    others = ("content_commitment", "data_encipherment", "key_agreement", "key_cert_sign",
              "crl_sign", "encipher_only", "decipher_only", "digital_signature")  # fmt: skip
    return x509.KeyUsage(key_encipherment=True, **dict.fromkeys(others, False))


def test_peers_do_not_stop_early(files):
    text = files.read_text()
    files.write_text(
        text.replace(
            "[run]\n", '[run]\nstop_after = 2\neval_split = "validation"\neval_every = 1\n'
        )
    )
    with pytest.raises(ValueError, match="Peers can't agree on stop_after"):
        load_federation(files)


PEM, DER = serialization.Encoding.PEM, serialization.Encoding.DER
LOCKED = serialization.BestAvailableEncryption(b"open-sesame")
OTHER_NAMES = x509.NameConstraints([x509.DNSName("example.org")], None)
SERVER = [x509.ExtendedKeyUsageOID.SERVER_AUTH]
UNFIT = {
    "locked key": ("key", lambda files, good: key_as(good.key, PEM, LOCKED), "encrypted.*decrypt"),
    "key in DER": ("key", lambda files, good: key_as(good.key, DER), "no PEM key.*-inform DER"),
    "empty key": ("key", lambda files, good: b"", "no PEM key"),
    "a certificate as key": ("key", lambda files, good: good.certificate, "no PEM key"),
    "another's key": ("key", lambda files, good: signed(files).key, "is not the key of"),
    "nothing": ("certificate", lambda files, good: b"nothing", "no PEM certificate"),
    "empty authority": ("ca", lambda files, good: b"", "no PEM certificate.*authority's"),
    "foreign authority": ("ca", lambda files, good: make_authority("x").certificate, "signed by"),
    "namesake authority": (
        "ca", lambda files, good: make_authority("trial").certificate, "not with the key of",
    ),
    "expired": ("pair", lambda files, good: signed(files, end=-0.5), "expired on.*clock says"),
    "not valid yet": ("pair", lambda files, good: signed(files, begin=1), "before.*set the clock"),
    "expired authority": (
        "ca", lambda files, good: make_authority("trial", days=-1).certificate, "expired on",
    ),
    "another name": ("pair", lambda files, good: signed(files, "bob"), "is for bob"),
    "server only": (
        "pair", lambda files, good: signed(files, extended=SERVER), "for clientAuth",
    ),
    "a key that TLS has no use for": (
        "pair", lambda files, good: signed(files, key=ed25519.Ed25519PrivateKey.generate()),
        "Ed25519.*openssl genpkey",
    ),
    "a curve that TLS has no use for": (
        "pair", lambda files, good: signed(files, key=ec.generate_private_key(ec.SECP521R1())),
        "secp521r1.*openssl genpkey",
    ),
    "an authority that may not sign": (
        "pair", lambda files, good: under(files, authority(no_signature())), "no connection under",
    ),
    "an authority for other names": (
        "pair", lambda files, good: under(files, authority(OTHER_NAMES)), "permitted subtree",
    ),
    "no signing": ("pair", lambda files, good: signed(files, usages=no_signature()), "not sign"),
}  # fmt: skip
"""What is wrong -> the file, what is in it, and what is said of it."""


@pytest.mark.parametrize("kind", UNFIT)
def test_unfit_papers_are_refused_in_a_line_with_file_and_remedy(files, kind):
    settings = load_peer(files, "ann")
    good = Pair(settings.certificate.read_bytes(), settings.key.read_bytes())
    which, make, message = UNFIT[kind]
    made = make(files, good)
    if isinstance(made, Pair):
        settings.certificate.write_bytes(made.certificate)
        settings.key.write_bytes(made.key)
    else:
        getattr(settings, which).write_bytes(made)
    with pytest.raises(ValueError, match=message) as refused:
        read_credentials(settings)
    said = str(refused.value)
    named = settings.certificate if which == "pair" else getattr(settings, which)
    named = settings.key if "TLS has no use" in kind else named
    assert str(named) in said
    assert "\n" not in said
    assert ";" in said or ":" in said, "with what to do"


def test_papers_of_another_making_are_taken(files):
    """Without usages anything goes; through an authority in between too."""
    settings = load_peer(files, "ann")
    pair = signed(files)
    settings.certificate.write_bytes(pair.certificate + authority_of(files).certificate)
    settings.key.write_bytes(pair.key)
    assert read_credentials(settings)[1].key == pair.key


def test_papers_as_editors_and_renewals_leave_them_are_taken(files):
    """With a byte order mark, a chain in any order, and the authority's old certificate first."""
    settings = load_peer(files, "ann")
    old, root = authority(begin=-90, end=-30), authority()
    between = authority(above=root)
    below = authority(above=between, begin=-2)
    pair = signed(files, by=below)
    settings.ca.write_bytes(old.certificate + root.certificate)
    settings.certificate.write_bytes(pair.certificate + between.certificate + below.certificate)
    settings.key.write_bytes(pair.key)
    for path in (settings.ca, settings.certificate, settings.key):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    ca, own = read_credentials(settings)
    assert all(data.startswith(b"-----BEGIN") for data in (ca, own.certificate, own.key))


def test_the_figures_of_one_hosts_peers_are_on_different_ports(tmp_path):
    addresses = ["127.0.0.1:9600", "127.0.0.1:9601", "h:7600"]
    assert metrics_addresses(addresses) == [
        "127.0.0.1:9602", "127.0.0.1:9603", "127.0.0.1:9600",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("address", "right"),
    [
        ("::1:7600", r"\[::1\]:7600, an IPv6 host in brackets"),
        ("fe80::1:7600", r"\[fe80::1\]:7600"),
        ("http://h:7600", "such as h:7600"),
        ("grpc://10.0.0.2:7600/", "such as 10.0.0.2:7600"),
        ("a b:7600", "such as 10.0.0.1:7600"),
        ("[x]:1", "such as 10.0.0.1:7600"),
        ("h:1\n", "such as"),
    ],
)
def test_an_address_in_another_form_is_refused_with_the_right_one(address, right):
    with pytest.raises(ValueError, match=right):
        split_address(address)


def test_a_secret_is_never_written_over(tmp_path):
    write_secret(tmp_path / "key", b"1")
    with pytest.raises(FileExistsError):
        write_secret(tmp_path / "key", b"2")


# -- validation


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": ""}, "no id"),
        ({"peers": PEERS[:1]}, "two peers or more"),
        ({"peers": (PEERS[0], PEERS[0])}, "name a"),
        ({"peers": (PEERS[0], Member(name="b", address=PEERS[0].address))}, "address 10"),
        ({"config": CONFIG}, "clients is 10, but there are 2 peers"),
    ],
)
def test_federations_that_cannot_be(change, message):
    with pytest.raises(ValueError, match=message):
        federation(**change)


@pytest.mark.parametrize("name", ["", "A", "a b", "-a", "a.b", "a" * 64, "../x"])
def test_names_that_are_none(name):
    with pytest.raises(ValueError, match="named"):
        Member(name=name, address="h:1")


@pytest.mark.parametrize("address", ["", "host", "host:", ":1", "host:0", "host:65536", "h:x"])
def test_addresses_that_are_none(address):
    with pytest.raises(ValueError, match="host:port"):
        split_address(address)


@pytest.mark.parametrize(
    "change",
    [
        {"max_message_bytes": 0},
        {"round_timeout_s": -1.0},
        {"start_timeout_s": 0.0},
        {"linger_s": -1.0},
        {"keep_rounds": 0},
        {"norm_bound": 0.0},
    ],
)
def test_limits_that_cannot_be(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        Limits(**change)


def test_members_come_and_go():
    member = Member(name="a", address="h:1", joins=2, leaves=4)
    assert [t for t in range(6) if member.takes_part(t)] == [2, 3]
    with pytest.raises(ValueError, match="leaves before it joins"):
        Member(name="a", address="h:1", joins=2, leaves=2)


def test_peers_are_found_by_name():
    assert federation().index("b") == 1
    assert federation().member("b") is PEERS[1]
    with pytest.raises(ValueError, match="no peer 'c'; there are a, b"):
        federation().index("c")


def test_the_digest_covers_what_must_be_agreed_on_and_no_more():
    digest = federation().digest()

    def with_config(**change):
        return federation(config=dataclasses.replace(federation().config, **change))

    moved = (PEERS[0], dataclasses.replace(PEERS[1], address="x:1"))
    late = (PEERS[0], dataclasses.replace(PEERS[1], joins=1))
    assert with_config(train_file="mine.csv").digest() == digest
    assert federation(peers=moved, limits=Limits(linger_s=1)).digest() == digest
    for other in (
        with_config(lr=0.5),
        with_config(seed=1),
        with_config(mix="trimmed-mean:1"),
        federation(id="g"),
        federation(peers=late),
        federation(peers=PEERS[::-1]),
        federation(limits=Limits(symmetric_loss=True)),
        federation(labels=("x", "y")),
        federation(read={"weights_hash": "0123"}),
        with_config(weights="laplacian"),
        with_config(backbone="other"),
        with_config(load_in="8bit"),
    ):
        assert other.digest() != digest


GOOD = """
federation = "f"
[run]
rounds = 2
[[peers]]
name = "a"
address = "h:1"
[[peers]]
name = "b"
address = "h:2"
"""


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[run]", "[run", "is not TOML"),
        ("[run]", "[runs]", "unknown keys runs"),
        ('federation = "f"', "federation = 3", "must be a str"),
        ('federation = "f"', "", "no id"),
        ("rounds = 2", "round = 2", r"\[run\] has an unknown key round"),
        ("rounds = 2", 'rounds = "2"', r"\[run\]: rounds is '2'"),
        ("rounds = 2", "clients = 3", "leave clients out"),
        ("rounds = 2", "rounds = 0", "rounds is 0"),
        ('address = "h:2"', "", r"b has no address; write address = .* under \[\[peers\]\]"),
        ('address = "h:2"', 'address = "h:2"\nreachable = false', "leave one out"),
        ('federation = "f"', 'federation = "f"\nrelay = "h:2"', "the address h:2"),
        ('federation = "f"', 'federation = "f"\nrelay = "h"', "host:port"),
        ('address = "h:2"', 'address = "h"', "host:port"),
        ("[run]", "labels = [1, 2]\n[run]", "write two classes"),
        ("[run]", 'labels = ["a", "a"]\n[run]', "write two classes"),
        ("[run]", 'labels = ["a"]\n[run]', "write two classes"),
        ("[run]", 'labels = ["a", " "]\n[run]', "write two classes"),
        ("[run]", "[limits]\nlinger_s = true\n[run]", r"\[limits\]: linger_s"),
        ("[run]", "peers = [3]\n[run]", "TOML"),
    ],
)
def test_federation_files_that_cannot_be(tmp_path, old, new, message):
    path = tmp_path / "federation.toml"
    path.write_text(GOOD)
    assert load_federation(path).config.clients == 2
    path.write_text(GOOD.replace(old, new))
    with pytest.raises(ValueError, match=message) as caught:
        load_federation(path)
    assert str(path) in str(caught.value)


def test_a_list_of_something_else_than_peers(tmp_path):
    path = tmp_path / "federation.toml"
    path.write_text('federation = "f"\npeers = [1, 2]\n')
    with pytest.raises(ValueError, match="must be a table"):
        load_federation(path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('listen = "x"', "host:port"),
        ('metrics = "x"', "host:port"),
        ("[local]\nlr = 0.1", "sets lr; a peer may set"),
        ("[local]\ntrain_file = 3", "train_file is 3"),
        ("[local]\nnothing = 3", "unknown key nothing"),
        ("other = 3", "unknown keys other"),
    ],
)
def test_peer_files_that_cannot_be(files, line, message):
    path = files.parent / "ann" / "peer.toml"
    key = line.split(" =")[0]
    kept = [one for one in path.read_text().splitlines() if not one.startswith(key)]
    path.write_text("\n".join([*kept, line]))
    with pytest.raises(ValueError, match=message):
        load_peer(files, "ann")


def test_a_peer_brings_its_own_data(files):
    path = files.parent / "ann" / "peer.toml"
    path.write_text(path.read_text() + '[local]\ntrain_file = "rows.csv"\n')
    settings = load_peer(files, "ann")
    assert settings.apply(CONFIG).train_file == str(files.parent / "ann" / "rows.csv")


def test_a_peer_says_where_its_model_lies_what_its_columns_are_and_what_computes(files):
    path = files.parent / "ann" / "peer.toml"
    own = [
        'backbone = "model"', 'text_columns = "a,b"', 'label_column = "c"', 'device = "cpu"',
        "memory_gib = 2",
    ]  # fmt: skip
    path.write_text("\n".join([path.read_text(), "[local]", *own]))
    config = load_peer(files, "ann").apply(CONFIG)
    assert config.backbone == "model", "a name on the hub"
    (files.parent / "ann" / "model").mkdir()
    settings = load_peer(files, "ann")
    config = settings.apply(CONFIG)
    assert config.backbone == str(files.parent / "ann" / "model")
    assert (config.text_columns, config.label_column) == ("a,b", "c")
    assert settings.machine == Machine(device="cpu", memory_gib=2)


def test_a_peer_file_needs_its_keys(files):
    (files.parent / "ann" / "peer.toml").write_text('listen = "h:1"\n')
    with pytest.raises(ValueError, match="has no ca, certificate, key, out"):
        load_peer(files, "ann")
