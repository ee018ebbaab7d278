//! Names of the programs and of their read-only globals.

/// Defines the names. Each row has the name of a constant and that of its program.
macro_rules! program_names {
    ($($(#[$doc:meta])* $name:ident = $text:literal;)*) => {
        /// Names of the programs, as they are in the object and under the pin path.
        pub mod program_name {
            $($(#[$doc])* pub const $name: &str = $text;)*

            /// The names of all programs.
            pub const ALL: &[&str] = &[$($name),*];
        }
    };
}

program_names! {
    /// `cgroup/connect4`.
    CONNECT4 = "lb_connect4";
    /// `cgroup/connect6`.
    CONNECT6 = "lb_connect6";
    /// `cgroup/sendmsg4`.
    SENDMSG4 = "lb_sendmsg4";
    /// `cgroup/sendmsg6`.
    SENDMSG6 = "lb_sendmsg6";
    /// `cgroup/recvmsg4`.
    RECVMSG4 = "lb_recvmsg4";
    /// `cgroup/recvmsg6`.
    RECVMSG6 = "lb_recvmsg6";
    /// `cgroup/getpeername4`.
    GETPEERNAME4 = "lb_getpeername4";
    /// `cgroup/getpeername6`.
    GETPEERNAME6 = "lb_getpeername6";
    /// `cgroup/post_bind4`.
    POST_BIND4 = "lb_post_bind4";
    /// `cgroup/post_bind6`.
    POST_BIND6 = "lb_post_bind6";
    /// `cgroup/sock_release`.
    SOCK_RELEASE = "lb_sock_release";
    /// tc ingress.
    INGRESS = "lb_ingress";
    /// tc egress.
    EGRESS = "lb_egress";
    /// tc ingress of a device without a link-layer header.
    INGRESS_L3 = "lb_ingress_l3";
    /// tc egress of a device without a link-layer header.
    EGRESS_L3 = "lb_egress_l3";
    /// Agent call (XDP) that stores one word of FRONTENDS in place. See [`crate::abi::FrontendSwap`].
    FRONTEND_SWAP = "lb_frontend_swap";
    /// Agent call (XDP) that changes an entry of DEVICES in place. See [`crate::abi::DeviceSwap`].
    DEVICE_SWAP = "lb_device_swap";
    /// Agent call (XDP) that writes a trace event of the agent. See [`crate::abi::Event`].
    EVENT = "lb_event";
    /// Agent call (XDP) that copies an entry from an old map to the new one. See [`crate::abi::MoveRequest`].
    MOVE = "lb_move";
}

/// Begin of the names of all programs, in every build.
pub const PROGRAM_PREFIX: &str = "lb_";

/// Name of the read-only global with the number of slots in SOCKETS, minus one.
pub const SOCKETS_MASK_GLOBAL: &str = "SOCKETS_MASK";
/// Name of the read-only global with the `bpf_get_netns_cookie` of the node's network namespace.
pub const NODE_NETNS_GLOBAL: &str = "NODE_NETNS";
/// Name of the read-only global that is not zero if only sockets of the node's network namespace are served.
pub const NODE_ONLY_GLOBAL: &str = "NODE_ONLY";

/// Read-only global: not zero if the processor makes stores visible in program order (a `u32`), as x86 does. Programs then need no
/// barriers between stores.
pub const STORES_IN_ORDER_GLOBAL: &str = "STORES_IN_ORDER";
/// Name of the read-only global with the maps that are being replaced: see [`crate::abi::moving`]. The object without the feature
/// `moving` does not read it.
pub const MOVING_GLOBAL: &str = "MOVING";
/// Name of the read-only global with the number of slots in the old SOCKETS, minus one.
pub const SOCKETS_OLD_MASK_GLOBAL: &str = "SOCKETS_OLD_MASK";
