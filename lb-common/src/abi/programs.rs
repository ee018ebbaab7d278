//! Names of the programs and of their read-only globals.

/// Names of the programs, as they are in the object and under the pin path.
pub mod program_name {
    /// `cgroup/connect4`.
    pub const CONNECT4: &str = "lb_connect4";
    /// `cgroup/connect6`.
    pub const CONNECT6: &str = "lb_connect6";
    /// `cgroup/sendmsg4`.
    pub const SENDMSG4: &str = "lb_sendmsg4";
    /// `cgroup/sendmsg6`.
    pub const SENDMSG6: &str = "lb_sendmsg6";
    /// `cgroup/recvmsg4`.
    pub const RECVMSG4: &str = "lb_recvmsg4";
    /// `cgroup/recvmsg6`.
    pub const RECVMSG6: &str = "lb_recvmsg6";
    /// `cgroup/getpeername4`.
    pub const GETPEERNAME4: &str = "lb_getpeername4";
    /// `cgroup/getpeername6`.
    pub const GETPEERNAME6: &str = "lb_getpeername6";
    /// `cgroup/post_bind4`.
    pub const POST_BIND4: &str = "lb_post_bind4";
    /// `cgroup/post_bind6`.
    pub const POST_BIND6: &str = "lb_post_bind6";
    /// `cgroup/sock_release`.
    pub const SOCK_RELEASE: &str = "lb_sock_release";
    /// tc ingress.
    pub const INGRESS: &str = "lb_ingress";
    /// tc egress.
    pub const EGRESS: &str = "lb_egress";
    /// tc ingress of a device without a link-layer header.
    pub const INGRESS_L3: &str = "lb_ingress_l3";
    /// tc egress of a device without a link-layer header.
    pub const EGRESS_L3: &str = "lb_egress_l3";
    /// Agent call (XDP) that stores one word of FRONTENDS in place. See [`crate::abi::FrontendSwap`].
    pub const FRONTEND_SWAP: &str = "lb_frontend_swap";
    /// Agent call (XDP) that changes an entry of DEVICES in place. See [`crate::abi::DeviceSwap`].
    pub const DEVICE_SWAP: &str = "lb_device_swap";
    /// Agent call (XDP) that writes a trace event of the agent. See [`crate::abi::Event`].
    pub const EVENT: &str = "lb_event";
}

/// Name of the read-only global with the number of slots in SOCKETS, minus one.
pub const SOCKETS_MASK_GLOBAL: &str = "SOCKETS_MASK";
/// Name of the read-only global with the `bpf_get_netns_cookie` of the node's network namespace.
pub const NODE_NETNS_GLOBAL: &str = "NODE_NETNS";
/// Name of the read-only global that is not zero if only sockets of the node's network namespace are served.
pub const NODE_ONLY_GLOBAL: &str = "NODE_ONLY";
