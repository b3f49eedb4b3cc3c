"""Each finding fires on the fault it is for, names host and remedy, and a good site has none."""

from __future__ import annotations

import dataclasses
from ipaddress import IPv4Network
from pathlib import Path

import pytest
import yaml
from ansible_collections.chatnio.onprem.plugins.module_utils.preflight import (
    Finding,
    Machine,
    Rules,
    Site,
    examine,
    format_report,
)
from hypothesis import given
from hypothesis import strategies as st

ROLE = Path(__file__).resolve().parents[6] / "roles/preflight"
DATA = yaml.safe_load((ROLE / "vars/main.yml").read_text())
ROLE_VARIABLES = {"model_service_model", "model_service_workers", "preflight_profile"}
MODELS = {"smollm2-135m-instruct", "qwen3-8b"}
RULES = Rules(
    known_variables={*ROLE_VARIABLES, *DATA["__preflight_platform_variables"]},
    free_prefixes=list(DATA["__preflight_variable_prefixes"]),
    removed_variables=[{"name": "model_name", "since": "1.2.0", "instead": "model_service_model"}],
    profiles=DATA["__preflight_profiles"],
    gpus=DATA["__preflight_gpus"],
    systems=DATA["__preflight_systems"],
    clock_tolerance=30,
)
GIB = 2**30


def facts(management: str, business: str | None = None) -> dict:
    """Return what a machine that satisfies the profile `minimum` reports; 64 GB show as less."""
    return {
        "distribution": "Debian",
        "distribution_version": "12.11",
        "distribution_major_version": "12",
        "architecture": "x86_64",
        "service_mgr": "systemd",
        "python": {"version": {"major": 3, "minor": 11}, "executable": "/usr/bin/python3"},
        "interfaces": ["lo", "br-mgmt", "biz0"],
        "lo": {"ipv4": {"address": "127.0.0.1"}},
        "br_mgmt": {"ipv4": {"address": management}},
        "biz0": {"ipv4": {"address": business}} if business else {},
        "onprem_hardware": {
            "cores": 16,
            "memory_bytes": int(62.8 * GIB),
            "data_path": "/var",
            "free_bytes": 10**12,
            "nvme": [{"name": "nvme0n1", "bytes": 960 * 10**9}],
            "gpus": [{"address": "0000:3b:00.0", "id": "10de:1eb8", "memory_bytes": 15360 * 2**20}],
            "clock_offset": 1.5,
        },
    }


def machine(name: str, management: str, business: str | None = None) -> Machine:
    values = {
        "management_network": "10.0.0.0/24",
        "management_address": management,
        "business_network": "192.168.1.0/24",
        "model_service_model": "smollm2-135m-instruct",
        "preflight_profile": "minimum",
    }
    if business:
        values["business_address"] = business
    own = {"inventory_hostname": name, "ansible_host": management, "site_rack": "B7", "groups": {}}
    return Machine(name, values=values, variables={**values, **own}, facts=facts(management, business))


@pytest.fixture
def site() -> Site:
    """Four machines, and nothing wrong with them."""
    machines = [
        machine("c1", "10.0.0.11"),
        machine("m1", "10.0.0.21", "192.168.1.21"),
        machine("m2", "10.0.0.22", "192.168.1.22"),
        machine("gw1", "10.0.0.31", "192.168.1.31"),
    ]
    groups = {
        "all": ["c1", "m1", "m2", "gw1"],
        "control": ["c1"],
        "data": ["c1"],
        "mirror": ["c1"],
        "monitoring": [],
        "model_nodes": ["m1", "m2"],
        "gateway": ["gw1"],
    }
    return Site({one.name: one for one in machines}, groups, "inventories/test")


def altered(site: Site, host: str, **changes: object) -> Site:
    """Return the site with other fields of one machine."""
    changed = dataclasses.replace(site.machines[host], **changes)
    return dataclasses.replace(site, machines={**site.machines, host: changed})


def with_values(site: Site, hosts: str | list[str], **values: object) -> Site:
    """Return the site with other variables on some hosts; None unsets one."""
    for host in [hosts] if isinstance(hosts, str) else hosts:
        merged = {**site.machines[host].values, **values}
        site = altered(site, host, values={key: value for key, value in merged.items() if value is not None})
    return site


def with_facts(site: Site, host: str, **changes: object) -> Site:
    return altered(site, host, facts={**site.machines[host].facts, **changes})


def with_hardware(site: Site, host: str, **changes: object) -> Site:
    hardware = {**site.machines[host].facts["onprem_hardware"], **changes}
    return with_facts(site, host, onprem_hardware=hardware)


def with_variables(site: Site, host: str, **variables: object) -> Site:
    return altered(site, host, variables={**site.machines[host].variables, **variables})


def with_groups(site: Site, **groups: list[str]) -> Site:
    return dataclasses.replace(site, groups={**site.groups, **groups})


def only_finding(site: Site, rules: Rules = RULES, models: object = MODELS) -> Finding:
    findings = examine(site, rules, models)
    assert len(findings) == 1, format_report(findings)
    return findings[0]


def test_good_site_has_no_findings(site):
    assert examine(site, RULES, MODELS) == []
    assert format_report([]) == "preflight: 0 findings, nothing was changed"


def test_one_host_may_be_in_every_group():
    names = ("control", "data", "mirror", "monitoring", "model_nodes", "gateway")
    alone = Site(
        {"box": machine("box", "10.0.0.5", "192.168.1.5")}, {"all": ["box"], **{name: ["box"] for name in names}}
    )
    assert examine(alone, RULES, MODELS) == []


class TestGroups:
    def test_host_without_work(self, site):
        spare = dataclasses.replace(site, machines={**site.machines, "spare": machine("spare", "10.0.0.99")})
        finding = only_finding(spare)
        assert (finding.host, finding.subject) == ("spare", "groups")

    @pytest.mark.parametrize("group", ["control", "model_nodes", "gateway", "data", "mirror"])
    def test_empty_group(self, site, group):
        # Its hosts keep work elsewhere, so that nothing but the empty group is wrong.
        emptied = with_groups(site, monitoring=["c1", "m1", "m2", "gw1"], **{group: []})
        finding = only_finding(emptied)
        assert (finding.host, finding.found) == (group, "no host")

    def test_mistyped_group_is_recognised(self, site):
        renamed = with_groups(site, gateway=[], gateways=["gw1"], monitoring=["gw1"])
        assert only_finding(renamed).mend == "rename the group gateways"

    def test_second_mirror(self, site):
        finding = only_finding(with_groups(site, mirror=["c1", "gw1"]))
        assert "2 hosts: c1, gw1" in finding.found


class TestNetworks:
    @pytest.mark.parametrize("name", ["management_network", "business_network"])
    def test_missing(self, site, name):
        finding = only_finding(with_values(site, list(site.machines), **{name: None}))
        assert (finding.host, finding.subject, finding.found) == ("all", name, "not set")

    def test_address_in_place_of_network(self, site):
        finding = only_finding(with_values(site, list(site.machines), management_network="10.0.0.7/24"))
        assert finding.mend == "set management_network to 10.0.0.0/24"

    def test_nonsense(self, site):
        finding = only_finding(with_values(site, list(site.machines), management_network="ten"))
        assert (finding.found, finding.mend) == ("ten", "set management_network for the group all")

    def test_one_host_is_told_another(self, site):
        finding = only_finding(with_values(site, "c1", business_network="192.168.0.0/16"))
        assert finding.found == "192.168.0.0/16 on c1; 192.168.1.0/24 on gw1, m1, m2"

    @given(
        address=st.ip_addresses(v=4), prefix=st.integers(8, 30), shorter=st.integers(0, 8), shift=st.integers(1, 2**8)
    )
    def test_overlap(self, address, prefix, shorter, shift):
        inner = IPv4Network((address, prefix), strict=False)
        outer = inner.supernet(prefixlen_diff=shorter)
        apart = IPv4Network(((int(outer.network_address) + shift * outer.num_addresses) % 2**32, outer.prefixlen))
        alone = Site({"box": Machine("box")}, {})

        def overlaps(management, business):
            values = {"management_network": str(management), "business_network": str(business)}
            findings = examine(altered(alone, "box", values=values), RULES, None)
            return any("overlaps" in finding.found for finding in findings)

        assert overlaps(inner, outer)
        assert overlaps(outer, inner)
        assert overlaps(inner, apart) == inner.overlaps(apart)


class TestAddresses:
    def test_every_host_needs_a_management_address(self, site):
        finding = only_finding(with_values(site, "c1", management_address=None))
        assert (finding.host, finding.subject, finding.found) == ("c1", "management_address", "not set")
        assert finding.needed == "an address in 10.0.0.0/24"

    @pytest.mark.parametrize("host", ["gw1", "m1"])
    def test_gateways_and_model_nodes_need_a_business_address(self, site, host):
        finding = only_finding(with_values(site, host, business_address=None))
        assert (finding.host, finding.subject, finding.found) == (host, "business_address", "not set")
        assert finding.mend == f"set business_address for {host} in inventories/test"

    @pytest.mark.parametrize(
        ("address", "found"),
        [
            ("192.168.1.300", "192.168.1.300, which is no IPv4 address"),
            ("192.168.2.31", "192.168.2.31, which is not in 192.168.1.0/24"),
            ("192.168.1.0", "192.168.1.0, which is the network's own address"),
            ("192.168.1.255", "192.168.1.255, which is the broadcast address"),
        ],
    )
    def test_wrong_address(self, site, address, found):
        site = with_values(
            with_facts(site, "gw1", biz0={"ipv4": {"address": address}}), "gw1", business_address=address
        )
        assert only_finding(site).found == found

    def test_taken_address(self, site):
        site = with_values(
            with_facts(site, "m2", br_mgmt={"ipv4": {"address": "10.0.0.21"}}), "m2", management_address="10.0.0.21"
        )
        finding = only_finding(site)
        assert (finding.host, finding.found) == ("m1, m2", "10.0.0.21, on 2 hosts")

    @pytest.mark.parametrize("name", ["management", "business"])
    def test_address_is_on_no_interface(self, site, name):
        interface = {"management": "br_mgmt", "business": "biz0"}[name]
        finding = only_finding(with_facts(site, "gw1", **{interface: {}}))
        assert finding.subject == f"{name}_address"
        assert finding.found.endswith("is on no interface")

    def test_second_address_of_an_interface_counts(self, site):
        second = {"ipv4": {"address": "10.0.0.99"}, "ipv4_secondaries": [{"address": "10.0.0.31"}]}
        assert examine(with_facts(site, "gw1", br_mgmt=second), RULES, MODELS) == []

    def test_business_address_may_be_missing_where_its_interface_is_named(self, site):
        bare = with_values(with_facts(site, "gw1", biz0={}), "gw1", business_interface="biz0")
        assert examine(bare, RULES, MODELS) == []

    def test_named_interface_does_not_exist(self, site):
        finding = only_finding(with_values(site, "gw1", business_interface="eth9"))
        assert (finding.subject, finding.found) == ("business_interface", "no eth9; there are biz0, br-mgmt")

    def test_named_interface_of_a_network_that_the_host_does_not_serve(self, site):
        assert examine(with_values(site, "c1", business_interface="eth9"), RULES, MODELS) == []

    def test_address_is_on_another_interface_than_named(self, site):
        site = with_facts(site, "gw1", interfaces=["lo", "br-mgmt", "biz0", "biz1"], biz1={})
        finding = only_finding(with_values(site, "gw1", business_interface="biz1"))
        assert finding.found == "192.168.1.31 is on biz0"

    def test_both_addresses_on_one_interface(self, site):
        shared = {"ipv4": {"address": "10.0.0.31"}, "ipv4_secondaries": [{"address": "192.168.1.31"}]}
        finding = only_finding(with_facts(site, "gw1", br_mgmt=shared, biz0={}))
        assert (finding.subject, finding.found) == ("business_interface", "br-mgmt carries both networks")


class TestModel:
    def test_unknown(self, site):
        finding = only_finding(with_values(site, "m1", model_service_model="smollm2-135m-instuct"))
        assert (finding.host, finding.mend) == ("m1", "did you mean smollm2-135m-instruct?")
        assert finding.needed == "one of the bundle's models: qwen3-8b, smollm2-135m-instruct"

    def test_unset(self, site):
        finding = only_finding(with_values(site, ["m1", "m2"], model_service_model=None))
        assert (finding.host, finding.found) == ("model_nodes", "not set")

    def test_bundle_is_missing(self, site):
        missing = Finding("controller", "bundle", "no manifest", "a bundle", "make one")
        assert only_finding(site, models=missing) == missing

    def test_unreadable_bundle_dir_is_reported_once(self, site):
        for host in site.machines:
            site = altered(site, host, broken={"bundle_dir": "'nowhere' is undefined"})
        finding = only_finding(site, models=None)
        assert (finding.host, finding.subject, finding.found) == ("all", "bundle_dir", "'nowhere' is undefined")


class TestVariables:
    def test_unknown(self, site):
        finding = only_finding(with_variables(site, "m1", model_servce_workers=2))
        assert (finding.host, finding.subject) == ("m1", "model_servce_workers")
        assert finding.mend == "did you mean model_service_workers?"

    def test_of_the_site_needs_its_prefix(self, site):
        finding = only_finding(with_variables(site, "m1", rack="B7"))
        assert finding.mend == "take it out, or call it site_rack if it is your own"

    @pytest.mark.parametrize("name", ["site_rack", "vault_x", "ansible_user", "awx_job_id", "molecule_file", "__r"])
    def test_free_prefixes(self, site, name):
        assert examine(with_variables(site, "m1", **{name: 1}), RULES, MODELS) == []

    def test_removed(self, site):
        finding = only_finding(with_variables(site, "m1", model_name="x"))
        assert (finding.found, finding.mend) == ("removed in 1.2.0", "set model_service_model instead of model_name")

    @pytest.mark.parametrize("value", ["{{ vault_key }}", {"a": ["x", "{{ vault_key | trim }}"]}])
    def test_secret_that_is_used_but_not_set(self, site, value):
        finding = only_finding(with_variables(site, "m1", site_a=value, site_b=value))
        assert (finding.host, finding.subject, finding.found) == ("m1", "vault_key", "not set, but site_a uses it")
        assert examine(with_variables(site, "m1", site_a=value, vault_key=""), RULES, MODELS) == []

    def test_text_is_no_use_of_a_secret(self, site):
        assert examine(with_variables(site, "m1", site_note="see vault_key"), RULES, MODELS) == []


class TestSystem:
    def test_silent_machine(self, site):
        finding = only_finding(altered(site, "m1", facts={}, silence="Connection refused"))
        assert (finding.host, finding.subject, finding.found) == ("m1", "connection", "Connection refused")

    def test_machine_that_was_not_asked(self, site):
        assert examine(altered(site, "m1", facts={}), RULES, MODELS) == []

    @pytest.mark.parametrize(
        ("name", "version", "found", "fatal"),
        [
            ("Debian", "11.7", "Debian 11.7", True),
            ("Ubuntu", "20.04", "Ubuntu 20.04", True),
            ("Debian", "13.1", "Debian 13, supported but untested", False),
            ("Ubuntu", "22.04", "Ubuntu 22.04, supported but untested", False),
            ("Ubuntu", "24.04", "Ubuntu 24.04, supported but untested", False),
        ],
    )
    def test_distribution(self, site, name, version, found, fatal):
        major = version.split(".")[0]
        other = with_facts(
            site, "m1", distribution=name, distribution_version=version, distribution_major_version=major
        )
        finding = only_finding(other)
        assert (finding.subject, finding.found, finding.fatal) == ("system", found, fatal)

    @pytest.mark.parametrize(
        ("changes", "subject", "found"),
        [
            ({"architecture": "aarch64"}, "architecture", "aarch64"),
            ({"service_mgr": "sysvinit"}, "init system", "sysvinit"),
            (
                {"python": {"version": {"major": 3, "minor": 8}, "executable": "/usr/bin/python3.8"}},
                "python",
                "3.8 (/usr/bin/python3.8)",
            ),
        ],
    )
    def test_foundations(self, site, changes, subject, found):
        finding = only_finding(with_facts(site, "m1", **changes))
        assert (finding.subject, finding.found) == (subject, found)

    @pytest.mark.parametrize(
        ("offset", "found"), [(31, "31 s ahead of the controller"), (-3600, "3600 s behind the controller")]
    )
    def test_clock(self, site, offset, found):
        finding = only_finding(with_hardware(site, "m1", clock_offset=offset))
        assert (finding.subject, finding.found) == ("clock", found)

    def test_clock_within_tolerance(self, site):
        assert examine(with_hardware(site, "m1", clock_offset=-30), RULES, MODELS) == []


class TestHardware:
    def test_unknown_profile(self, site):
        finding = only_finding(with_values(site, ["m1", "m2"], preflight_profile="minimun"))
        assert (finding.host, finding.mend) == ("model_nodes", "did you mean minimum?")

    @pytest.mark.parametrize(
        ("changes", "subject", "found", "needed"),
        [
            ({"cores": 8}, "cores", "8", "16 (profile minimum)"),
            ({"memory_bytes": 60 * GIB}, "memory", "60 GB", "64 GB (profile minimum)"),
            ({"free_bytes": 10**9}, "free disk, /var", "1 GB", "50 GB (profile minimum)"),
            ({"nvme": []}, "NVMe", "0 GB", "1000 GB (profile minimum)"),
            ({"gpus": []}, "GPU memory", "0 GB", "8 GB (profile minimum)"),
            (
                {"gpus": [{"address": "0000:3b:00.0", "id": "10de:1eb8", "memory_bytes": 4 * GIB}]},
                "GPU memory",
                "4 GB",
                "8 GB (profile minimum)",
            ),
        ],
    )
    def test_below_the_profile(self, site, changes, subject, found, needed):
        finding = only_finding(with_hardware(site, "m1", **changes))
        assert (finding.host, finding.subject, finding.found, finding.needed) == ("m1", subject, found, needed)

    def test_only_model_nodes_need_gpu_and_nvme(self, site):
        assert examine(with_hardware(site, "c1", gpus=[], nvme=[]), RULES, MODELS) == []

    def test_gpu_without_driver_is_known_by_its_pci_id(self, site):
        t4 = [{"address": "0000:3b:00.0", "id": "10de:1eb8", "memory_bytes": None}]
        assert examine(with_hardware(site, "m1", gpus=t4), RULES, MODELS) == []

    def test_gpu_that_nothing_is_known_of_is_a_warning(self, site):
        new = [{"address": "0000:3b:00.0", "id": "10de:ffff", "memory_bytes": None}]
        finding = only_finding(with_hardware(site, "m1", gpus=new))
        assert "10de:ffff" in finding.found
        assert not finding.fatal

    def test_recommended_needs_three_data_hosts(self, site):
        big = {"cores": 32, "memory_bytes": 126 * GIB}
        site = with_hardware(with_values(site, "c1", preflight_profile="recommended"), "c1", **big)
        finding = only_finding(site)
        assert (finding.host, finding.found, finding.needed) == ("data", "1", "3 (profile recommended)")

    def test_lab_needs_no_gpu(self, site):
        small = {"cores": 2, "memory_bytes": 4 * GIB, "free_bytes": 6 * 10**9, "nvme": [], "gpus": []}
        for host in site.machines:
            site = with_values(with_hardware(site, host, **small), host, preflight_profile="lab")
        assert examine(site, RULES, MODELS) == []


def test_everything_is_listed_at_once_and_warnings_last(site):
    site = with_facts(site, "c1", distribution_version="13.0", distribution_major_version="13")
    site = with_hardware(site, "m1", gpus=[], clock_offset=99)
    site = with_variables(with_values(site, "gw1", business_address=None), "m2", rack=1)
    findings = examine(site, RULES, {"other"})
    assert [finding.subject for finding in findings] == [
        "business_address",
        "model_service_model",
        "rack",
        "clock",
        "GPU memory",
        "system",
    ]
    assert format_report(findings).startswith("preflight: 5 findings and 1 warning, nothing was changed\n")


def test_report_has_one_line_for_what_hosts_have_in_common(site):
    for host in ("m1", "m2"):
        site = with_hardware(site, host, cores=8)
    findings = examine(site, RULES, MODELS)
    assert [finding.host for finding in findings] == ["m1", "m2"]
    assert format_report(findings, site.label).splitlines()[1].startswith("  model_nodes    cores    found: 8")


def test_report_is_aligned():
    findings = [
        Finding("gw1", "business_address", "not set", "an address in 192.168.1.0/24", "set it"),
        Finding("control1", "clock", "x" * 80, "less", "mend it", fatal=False),
    ]
    assert format_report(findings).splitlines() == [
        "preflight: 1 finding and 1 warning, nothing was changed",
        "  gw1         business_address    found: not set    needed: an address in 192.168.1.0/24    mend: set it",
        f"  control1    clock (warning)     found: {'x' * 80}    {'needed: less':36}    mend: mend it",
    ]
