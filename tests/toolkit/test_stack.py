"""The layout of a stack: who runs, where, with which settings."""

from dataclasses import replace
from itertools import count
from pathlib import Path

from services.common.tls import FrontCert
from toolkit.stack import Stack, StackOptions, plan_stack

OPTIONS = StackOptions(host="0.0.0.0", http_ports=(8000,), grpc_ports=(50051,))


def plan(options: StackOptions = OPTIONS, cores: int = 8) -> Stack:
    return plan_stack(options, count(20_000), cores)


def tiers(stack: Stack) -> list[list[str]]:
    return [[member.name for member in tier] for tier in stack.tiers]


def redis_urls(stack: Stack) -> dict[str, object]:
    """Of those that get one."""
    return {member.name: member.settings["redis_url"] for member in stack.members if "redis_url" in member.settings}


def test_what_others_need_starts_first() -> None:
    assert tiers(plan()) == [["redis"], ["cache"], ["scheduler"], ["worker"], ["gateway"]]


def test_an_existing_redis_is_used_and_not_started() -> None:
    stack = plan(StackOptions(host="127.0.0.1", http_ports=(1,), grpc_ports=(2,), redis_url="redis://elsewhere/3"))
    assert tiers(stack)[0] == ["cache"]
    assert redis_urls(stack) == {"scheduler": "redis://elsewhere/3", "gateway": "redis://elsewhere/3"}


def test_everyone_finds_everyone() -> None:
    stack = plan()
    redis, cache, scheduler, worker, gateway = stack.members
    for member in (worker, gateway):
        assert member.settings["schedulers"] == scheduler.address
        assert member.settings["caches"] == cache.address
    assert scheduler.settings["caches"] == cache.address
    url = f"redis://{redis.address}/0"
    assert redis_urls(stack) == {"scheduler": url, "gateway": url}, "its password is not for the others"


def test_ports_and_ids_are_distinct() -> None:
    members = plan(StackOptions(host="127.0.0.1", http_ports=(1,), grpc_ports=(2,), workers=3)).members
    ports = [value for member in members for name, value in member.settings.items() if name.endswith("port")]
    assert len(ports) == len(set(ports)) == 2 * 5 + 2
    assert [member.name for member in members if member.service == "worker"] == ["worker-1", "worker-2", "worker-3"]
    assert all(member.settings["id"] == member.name for member in members if member.service != "redis")


def test_workers_share_the_cores() -> None:
    def threads(workers: int, cores: int, **given: object) -> object:
        options = StackOptions(host="h", http_ports=(1,), grpc_ports=(2,), workers=workers, worker_settings=given)
        return plan(options, cores).tiers[3][0].settings.get("threads")

    assert threads(1, 8) is None
    assert threads(2, 8) == 4
    assert threads(4, 2) == 1
    assert threads(2, 8, threads=3) == 3


def test_the_gateway_listens_everywhere_and_is_reached_here() -> None:
    stack = plan()
    gateway = stack.members[-1]
    assert gateway.settings["host"] == "0.0.0.0"
    assert (stack.http_urls, stack.grpc_address) == (("http://127.0.0.1:8000",), "127.0.0.1:50051")
    assert gateway.ready_url == "http://127.0.0.1:8000/health/ready"


def test_an_ipv6_host_is_bracketed_in_addresses() -> None:
    stack = plan(StackOptions(host="::1", http_ports=(8000,), grpc_ports=(50051,)))
    assert (stack.http_urls, stack.grpc_address) == (("http://[::1]:8000",), "[::1]:50051")


def test_only_workers_get_variables_of_the_tensor_library() -> None:
    assert [member.service for member in plan().members if member.environment] == ["worker"]


def test_workers_of_one_machine_share_its_memory_and_cores() -> None:
    alone = plan(cores=8)
    several = plan(StackOptions(host="0.0.0.0", http_ports=(8000,), grpc_ports=(50051,), workers=4), cores=8)
    variable = "HEADRACE_WORKER_KV_MEMORY_FRACTION"
    assert variable not in next(member for member in alone.members if member.service == "worker").environment
    workers = [member for member in several.members if member.service == "worker"]
    assert sum(float(worker.environment[variable]) for worker in workers) <= 0.6
    assert sum(int(str(worker.settings["threads"])) for worker in workers) == 8


def test_workers_with_roles_are_named_after_them() -> None:
    stack = plan(replace(OPTIONS, workers=0, prefill_workers=1, decode_workers=2))
    workers = {member.name: member.settings["role"] for member in stack.members if member.service == "worker"}
    assert workers == {"prefill": "prefill", "decode-1": "decode", "decode-2": "decode"}


def test_a_placement_policy_is_the_schedulers() -> None:
    stack = plan(replace(OPTIONS, placement="round_robin"))
    policies = {member.service: member.settings.get("policy") for member in stack.members}
    assert policies == {"redis": None, "cache": None, "scheduler": "round_robin", "worker": None, "gateway": None}


def test_replicas_have_ports_and_names_of_their_own_and_everyone_finds_all_schedulers() -> None:
    stack = plan(replace(OPTIONS, http_ports=(8000, 8001), grpc_ports=(50051, 50052), schedulers=2))
    assert tiers(stack)[2:] == [["scheduler-1", "scheduler-2"], ["worker"], ["gateway-1", "gateway-2"]]
    schedulers = ",".join(member.address for member in stack.tiers[2])
    assert {member.settings["schedulers"] for tier in stack.tiers[3:] for member in tier} == {schedulers}
    assert stack.http_urls == ("http://127.0.0.1:8000", "http://127.0.0.1:8001")
    assert [member.settings["grpc_port"] for member in stack.tiers[-1]] == [50051, 50052]


def test_fronts_on_tls() -> None:
    stack = plan(replace(OPTIONS, front_cert=FrontCert("/c/front.crt", "llm.example.com"), front_key="/c/front.key"))
    gateway = stack.members[-1]
    assert (gateway.settings["tls_cert"], gateway.settings["tls_key"]) == ("/c/front.crt", "/c/front.key")
    assert stack.http_urls == ("https://127.0.0.1:8000",)
    assert gateway.ready_url == "https://127.0.0.1:8000/health/ready"
    assert not any("tls_cert" in member.settings for member in stack.members[:-1])


def test_each_service_has_a_certificate_of_its_own() -> None:
    stack = plan(replace(OPTIONS, mtls=Path("/run/tls"), workers=2))
    certs = [member.settings.get("mtls_cert") for member in stack.members]
    services = ("cache", "scheduler", "worker", "worker", "gateway")
    assert certs == [None, *(f"/run/tls/{service}.crt" for service in services)]
    assert {member.settings["mtls_ca"] for member in stack.members[1:]} == {"/run/tls/ca.crt"}
