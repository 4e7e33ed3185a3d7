"""Drives pve-sim with proxmoxer, a client that was written for Proxmox VE itself.

usage: with_proxmoxer.py READY_JSON TEMPLATE

READY_JSON is what pve-sim has announced itself with, TEMPLATE an archive of a root file system with
/bin/sleep. The VMIDs are those from the environment variable VMID on.
"""

import json
import os
import sys
import time

from proxmoxer import ProxmoxAPI, ResourceException
from proxmoxer.tools import Tasks


def read(path):
    with open(path, encoding="utf-8") as file:
        return file.read().strip()


def finished(api, upid, expected="OK"):
    status = Tasks.blocking_status(api, upid, timeout=60, polling_interval=0.05)
    assert status is not None, f"{upid} does not end"
    assert status["exitstatus"] == expected, status
    return status


def refused(call, status, text):
    try:
        call()
    except ResourceException as error:
        assert error.status_code == status, error
        assert text in str(error), error
    else:
        raise AssertionError(f"not refused with {status} {text}")


def by_token(ready, where):
    name, secret = read(ready["admin_token_file"]).split("=")
    user, token = name.split("!")
    return ProxmoxAPI(where, user=user, token_name=token, token_value=secret,
                      verify_ssl=ready["ca_file"])


def by_password(ready, where):
    user, password = read(ready["password_file"]).split("=")
    return ProxmoxAPI(where, user=user, password=password, verify_ssl=ready["ca_file"])


def check(api, ready, template, vmid):
    assert api.version.get()["release"] == "9.2"
    node = api.nodes(ready["node"])
    assert [n["node"] for n in api.nodes.get()] == [ready["node"]]

    # Upload, whose answer is the name of a task.
    with open(template, "rb") as file:
        finished(api, node.storage("local").upload.post(content="vztmpl", filename=file))
    volume = "local:vztmpl/" + os.path.basename(template)
    found = [c["volid"] for c in node.storage("local").content.get(content="vztmpl")]
    assert found == [volume], found

    # Create.
    upid = node.lxc.post(vmid=vmid, ostemplate=volume, rootfs="local:0", hostname="web", memory=64,
                         ostype="unmanaged", arch="amd64", entrypoint="/bin/sleep 1000",
                         unprivileged=0, console=0, tty=0, tags="a;b", description="one\ntwo")
    finished(api, upid)
    refused(lambda: node.lxc.post(vmid=vmid, ostemplate=volume), 500, "already exists")
    ct = node.lxc(vmid)
    config = ct.config.get()
    assert (config["hostname"], config["memory"], config["tags"]) == ("web", 64, "a;b"), config
    assert config["description"] == "one\ntwo\n", config
    assert ct.status.current.get()["status"] == "stopped"

    # Change, with the digest of what was read.
    ct.config.put(memory=128, digest=config["digest"])
    refused(lambda: ct.config.put(memory=256, digest=config["digest"]), 500, "detected modified")
    refused(lambda: ct.config.put(memory="much"), 400, "memory")
    assert ct.config.get()["memory"] == 128

    # Start, look, stop.
    finished(api, ct.status.start.post())
    status = ct.status.current.get()
    assert status["status"] == "running" and status["pid"] > 0, status
    assert status["maxmem"] == 128 << 20, status
    assert [c["vmid"] for c in node.lxc.get() if c["status"] == "running"] == [vmid]
    refused(ct.status.start.post, 500, f"CT {vmid} already running")
    refused(ct.delete, 500, "container is running")
    assert [i["name"] for i in ct.interfaces.get()] == ["lo"]
    finished(api, ct.status.stop.post())
    assert ct.status.current.get()["status"] == "stopped"

    # Tasks, and what a log says.
    tasks = node.tasks.get(vmid=vmid)
    assert [t["type"] for t in tasks] == ["vzstop", "vzstart", "vzcreate"], tasks
    log = Tasks.decode_log(node.tasks(tasks[2]["upid"]).log.get())
    assert log.endswith("TASK OK"), log
    upid = node.lxc(vmid + 1).status.start.post()
    missing = f"Configuration file 'nodes/{ready['node']}/lxc/{vmid + 1}.conf' does not exist"
    finished(api, upid, missing)

    # Copy, destroy.
    finished(api, ct.clone.post(newid=vmid + 1, hostname="copy"))
    assert node.lxc(vmid + 1).config.get()["hostname"] == "copy"
    for one in (vmid, vmid + 1):
        finished(api, node.lxc(one).delete(purge=1))
    assert node.lxc.get() == []
    refused(ct.config.get, 500, "does not exist")
    refused(api.nope.get, 501, "not implemented")
    finished(api, node.storage("local").content(volume).delete())
    assert node.storage("local").content.get() == []


def main():
    ready, template = json.loads(read(sys.argv[1])), sys.argv[2]
    where = ready["endpoint"].removeprefix("https://")
    vmid = int(os.environ["VMID"])
    for n, login in enumerate((by_token, by_password)):
        start = time.monotonic()
        check(login(ready, where), ready, template, vmid + 10 * n)
        print(f"proxmoxer {login.__name__.replace('_', ' ')}: ok, {time.monotonic() - start:.1f} s")


if __name__ == "__main__":
    main()
