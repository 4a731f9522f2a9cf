"""Two hosts on one machine: namespaces of network and host name, joined by a cable that can be cut."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from faults.cases_launcher import FAMILY, GONE_S, LIMIT_S, RUN, processes
from faults.lab import Lab, changed, committed
from faults.rows import REPO, Tally, case
from megatron_lion.config import RunConfig
from megatron_lion.configfile import dump_config

TIMEOUT_S = 20
"""parallel.timeout_s of the runs; the loss of a host must be reported within ten seconds more."""
# Prints the pid of each host's namespaces. They end with this script, which ends with its standard input.
HOSTS = """
set -e
hostname hostA
ip link set lo up
ip link add cableA type veth peer name cableB
unshare -nump --fork --mount-proc sh -c 'hostname hostB; ip link set lo up; exec sleep infinity' &
until other=$(pgrep -P $! sleep); do sleep 0.02; done
ip link set cableB netns $other
ip addr add 10.77.0.1/24 dev cableA
ip link set cableA up
nsenter -t $other -n ip addr add 10.77.0.2/24 dev cableB
nsenter -t $other -n ip link set cableB up
echo $$ $other
cat >/dev/null
kill -9 $other
"""


class Hosts:
    """Two hosts A (10.77.0.1) and B (10.77.0.2), whose names nothing resolves. Root is not needed.

    Raises:
        AssertionError: the machine cannot make such namespaces; names the reason.
    """

    def __init__(self) -> None:
        self._script = subprocess.Popen(
            ["unshare", "-Urnu", "--kill-child", "sh", "-c", HOSTS], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self._script.stdout is not None
        assert self._script.stderr is not None
        pids = self._script.stdout.readline().split()
        assert len(pids) == 2, f"no namespaces for two hosts: {self._script.stderr.read()[-300:]}"
        self.pids = dict(zip("AB", map(int, pids), strict=True))
        self._kept = {pid for host in "AB" for pid in self._processes(host)}  # those that hold the namespaces

    def __enter__(self) -> Hosts:
        return self

    def __exit__(self, *exception: object) -> None:
        for host in self.pids:
            self.kill(host)
        assert self._script.stdin is not None
        self._script.stdin.close()
        self._script.wait(30)

    def command(self, host: str, *words: str) -> list[str]:
        """The words that run a command on a host."""
        own = ["-m", "-p"] if host == "B" else []  # else a rank on B would see the processes on A
        enter = [
            "nsenter",
            "-t",
            str(self.pids[host]),
            "-U",
            "-n",
            "-u",
            *own,
            "--preserve-credentials",
            f"--wd={REPO}",
        ]
        return [*enter, *words]

    def cut(self) -> None:
        """Cuts the cable: no packet arrives, and no connection is closed."""
        subprocess.run(self.command("A", "ip", "link", "set", "cableA", "down"), check=True)

    def repair(self) -> None:
        """Connects the cable again."""
        subprocess.run(self.command("A", "ip", "link", "set", "cableA", "up"), check=True)

    def kill(self, host: str) -> None:
        """Kills every process on a host at the same time, but not the host's namespaces."""
        for pid in self._processes(host) - self._kept:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _processes(self, host: str) -> set[int]:
        network, found = os.readlink(f"/proc/{self.pids[host]}/ns/net"), set()
        for path in Path("/proc").glob("[0-9]*/ns/net"):
            with suppress(OSError):  # it has ended, or belongs to another user
                if os.readlink(path) == network:
                    found.add(int(path.parts[2]))
        return found


class TwoLaunched:
    """A run of two ranks on each of two hosts, under launch/torchrun.sh on both."""

    def __init__(self, hosts: Hosts, config: RunConfig) -> None:
        self.config, self.path = config, Path(f"{config.run_dir}.yaml")
        self.path.write_text(dump_config(config))
        self.errors = {host: Path(f"{config.run_dir}.{host}.err") for host in "AB"}
        variables = {
            **os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO), "NNODES": "2",
            "NPROC_PER_NODE": "2", "MASTER_ADDR": "10.77.0.1", "MASTER_PORT": "29555", "JOB_ID": os.urandom(16).hex(),
        }  # fmt: skip
        self.jobs = {}
        for host, path in self.errors.items():
            with open(path, "w") as err:
                self.jobs[host] = subprocess.Popen(
                    hosts.command(host, "bash", str(REPO / "launch" / "torchrun.sh"), str(self.path)), cwd=REPO, env=variables,
                    stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=err, start_new_session=True,
                )  # fmt: skip

    def __enter__(self) -> TwoLaunched:
        first = self.lines()
        deadline = time.monotonic() + LIMIT_S
        while self.lines() < first + 5:
            ended = [host for host, job in self.jobs.items() if job.poll() is not None]
            if ended or time.monotonic() > deadline:
                output = {host: path.read_text()[-500:] for host, path in self.errors.items()}
                raise AssertionError(f"the job on two hosts did not begin: {output}")
            time.sleep(0.1)
        return self

    def __exit__(self, *exception: object) -> None:
        for pid in processes(str(self.path)):
            os.kill(pid, signal.SIGKILL)
        for job in self.jobs.values():
            job.wait(30)

    def lines(self) -> int:
        metrics = Path(self.config.run_dir, "metrics.jsonl")
        return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def after(lab: Lab, tally: Tally, what: str, hosts: Hosts, survivors: str) -> None:
    """Starts the run, kills host B or cuts the cable, and counts codes and times; then the same commands train on."""
    config = lab.config("hosts", **{**RUN, "parallel__timeout_s": TIMEOUT_S})
    config = changed(config, {"parallel__tensor_model_parallel_size": 2, "checkpoint__every": 5})
    with TwoLaunched(hosts, config) as job:
        lab.wait_for(lambda: bool(committed(config.run_dir)))
        tally.injected += 1
        since = time.monotonic()
        hosts.kill("B") if what == "kill" else hosts.cut()
        for host in survivors:
            try:
                code = job.jobs[host].wait(LIMIT_S)
            except subprocess.TimeoutExpired:
                tally.verdict(what, "stuck", f"the launcher on host {host} did not end")
                return
            seconds = time.monotonic() - since
            tally.detect_s = max(tally.detect_s, seconds)
            errors = job.errors[host].read_text(errors="replace")
            tally.code(f"{what}: host {host}", code, (8,), errors)
            other = ("hostB",) if host == "A" else ("hostA", "10.77.0.1")
            if not any(name in errors for name in other):
                tally.wrong.append(f"{what}: host {host} does not name the lost one: {errors[-300:]}")
            if seconds > TIMEOUT_S + 10:
                tally.wrong.append(
                    f"{what}: host {host} ended after {seconds:.0f} s, parallel.timeout_s is {TIMEOUT_S}"
                )
        deadline = time.monotonic() + GONE_S
        while (left := processes(str(job.path))) and time.monotonic() < deadline:
            time.sleep(0.2)
        if left:
            tally.verdict(what, "stuck", f"{len(left)} processes are left")
            return
    hosts.repair()
    before = max(committed(config.run_dir))
    with TwoLaunched(hosts, config) as again:
        again.jobs["A"].send_signal(signal.SIGTERM)
        codes = [again.jobs[host].wait(LIMIT_S) for host in "AB"]
    on = max(committed(config.run_dir)) > before
    tally.verdict(what, "recovered" if codes == [75, 75] and on else "stuck", f"the same command again: {codes}")


@case(
    "hosts-kill", FAMILY, "every process of one of two hosts is killed", f"8, the host named, within {TIMEOUT_S + 10} s"
)
def kill_host(lab: Lab, tally: Tally) -> None:
    with Hosts() as hosts:
        after(lab, tally, "kill", hosts, "A")


@case(
    "hosts-cable",
    FAMILY,
    "the cable between two hosts is cut",
    f"8 on both, the other named, within {TIMEOUT_S + 10} s",
)
def cut_cable(lab: Lab, tally: Tally) -> None:
    with Hosts() as hosts:
        after(lab, tally, "cable", hosts, "AB")
