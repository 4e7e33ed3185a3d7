use super::*;

#[test]
fn the_limit_is_above_the_first_ns() {
    for (cgroup, expected) in [
        ("/lxc/700/ns", Some("/lxc/700")),
        ("/lxc/700/ns/init.scope", Some("/lxc/700")),
        ("/kubepods/burstable/pod1/abc/ns", Some("/kubepods/burstable/pod1/abc")),
        ("/lxc/700/ns/docker/1/ns", Some("/lxc/700")),
        ("/lxc/nspawn/ns", Some("/lxc/nspawn")),
        ("/lxc/700/nsx", None),
        ("/ns", None),
        ("/", None),
        ("/system.slice/containerd.service", None),
    ] {
        assert_eq!(split_inner(cgroup), expected, "{cgroup}");
    }
}
