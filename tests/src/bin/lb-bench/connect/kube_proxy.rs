//! The rules of kube-proxy for the benchmark's Services, in the layout of version 1.36 (`pkg/proxy/nftables/proxier.go`,
//! `pkg/proxy/iptables/proxier.go`): base chains, dispatch, one chain for each Service, and with iptables one for each
//! endpoint. Rules for other kinds of Service are left out, as are comments if they cost nothing. All rules are written in
//! namespaces of the test bed.

use std::fmt::Write as _;
use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use lb_tests::{Netns, Process};
use which::which;

use crate::objects::{self, BACKEND_PORT, Family, SERVICE_PORT, Services};

/// The pods' networks in the test bed; packets from other sources are masqueraded.
fn cluster_cidr(family: Family) -> &'static str {
    match family {
        Family::Ipv4 => "10.10.0.0/16",
        Family::Ipv6 => "fd00:10:10::/48",
    }
}

/// kube-proxy's mark for packets to be masqueraded.
const MARK: &str = "0x4000";
/// Number of endpoints from which on iptables mode writes fewer comments.
const LARGE_CLUSTER: u32 = 1000;
/// Time limit for loading rules.
const LOADING: Duration = Duration::from_secs(300);

/// A Service on a node port, in addition to the benchmark's others, with one backend and the policy Cluster.
#[derive(Debug, Clone)]
pub(crate) struct NodePort {
    /// `namespace/name`.
    pub(crate) name: String,
    /// Cluster IP.
    pub(crate) vip: IpAddr,
    /// The address of the node.
    pub(crate) node: IpAddr,
    pub(crate) port: u16,
    pub(crate) backend: IpAddr,
    /// True if the backend is on the node.
    pub(crate) is_local: bool,
}

/// Returns the numbers of a Service's backends.
fn backends(services: Services, service: u32) -> impl Iterator<Item = u32> {
    (0..services.endpoints).map(move |i| service * services.endpoints + i)
}

/// Loads the rules of nftables mode; returns the time that it took.
pub(crate) fn load_nftables(
    netns: &Netns,
    services: Services,
    node_ports: &[NodePort],
    scratch: &Path,
) -> Result<Duration> {
    let text = nftables(services, node_ports)?;
    load(netns, "nft", &["-f"], &text, &scratch.join("rules.nft"))
}

/// Loads the rules of iptables mode; returns the time that it took and the name of the program.
///
/// It prefers iptables-legacy if that is installed: iptables-legacy takes seconds and iptables-nft minutes, and the kernel
/// evaluates its rules faster, so the comparison errs in kube-proxy's favor.
pub(crate) fn load_iptables(
    netns: &Netns,
    services: Services,
    node_ports: &[NodePort],
    scratch: &Path,
) -> Result<(Duration, &'static str)> {
    let programs = match services.family {
        Family::Ipv4 => ["iptables-legacy-restore", "iptables-restore"],
        Family::Ipv6 => ["ip6tables-legacy-restore", "ip6tables-restore"],
    };
    let program = programs
        .into_iter()
        .find(|program| which(program).is_ok())
        .with_context(|| format!("{} is missing: install iptables", programs[1]))?;
    let text = iptables(services, node_ports)?;
    let time = load(netns, program, &["--noflush"], &text, &scratch.join("rules.iptables"))?;
    Ok((time, program))
}

fn load(netns: &Netns, program: &str, arguments: &[&str], rules: &str, file: &Path) -> Result<Duration> {
    fs::write(file, rules).with_context(|| format!("writing {}", file.display()))?;
    let start = Instant::now();
    let mut process = Process::spawn(netns.command(program)?.args(arguments).arg(file))?;
    let status = process.wait(LOADING)?;
    anyhow::ensure!(status.success(), "{program} {}: {status}", file.display());
    Ok(start.elapsed())
}

fn nftables(services: Services, node_ports: &[NodePort]) -> Result<String> {
    let cidr = cluster_cidr(services.family);
    let mut text = NFTABLES.replace("CLUSTER", cidr).replace("MARK", MARK);
    for service in 0..services.number {
        let vip = services.vip(service);
        let chain = format!("service-{service:08X}-{}/tcp/http", objects::name(service));
        let members: Vec<_> = backends(services, service)
            .enumerate()
            .map(|(i, backend)| format!("{i} : {} . {BACKEND_PORT}", services.backend(backend)))
            .collect();
        writeln!(
            text,
            "add chain ip kube-proxy {chain}\n\
             add rule ip kube-proxy {chain} meta l4proto tcp dnat ip addr . port to numgen random mod {} map {{ {} }}\n\
             add element ip kube-proxy cluster-ips {{ {vip} }}\n\
             add element ip kube-proxy service-ips {{ {vip} . tcp . {SERVICE_PORT} : goto {chain} }}",
            services.endpoints,
            members.join(", "),
        )?;
        // The set contains only endpoints on the node itself: one of each Service is assumed.
        if let Some(local) = backends(services, service).next() {
            let local = services.backend(local);
            writeln!(
                text,
                "add element ip kube-proxy hairpin-connections {{ {local} . {local} . tcp . {BACKEND_PORT} }}"
            )?;
        }
    }
    for (number, node_port) in node_ports.iter().enumerate() {
        let NodePort {
            name,
            vip,
            node,
            port,
            backend,
            is_local,
        } = node_port;
        let chain = format!("NODE{number:04}-{name}/tcp/http");
        writeln!(
            text,
            "add chain ip kube-proxy service-{chain}\n\
             add rule ip kube-proxy service-{chain} meta l4proto tcp dnat ip addr . port to numgen random mod 1 map \
             {{ 0 : {backend} . {BACKEND_PORT} }}\n\
             add chain ip kube-proxy external-{chain}\n\
             add rule ip kube-proxy external-{chain} mark set mark or {MARK}\n\
             add rule ip kube-proxy external-{chain} goto service-{chain}\n\
             add element ip kube-proxy cluster-ips {{ {vip} }}\n\
             add element ip kube-proxy service-ips {{ {vip} . tcp . {SERVICE_PORT} : goto service-{chain} }}\n\
             add element ip kube-proxy nodeport-ips {{ {node} }}\n\
             add element ip kube-proxy service-nodeports {{ tcp . {port} : goto external-{chain} }}",
        )?;
        if *is_local {
            writeln!(
                text,
                "add element ip kube-proxy hairpin-connections {{ {backend} . {backend} . tcp . {BACKEND_PORT} }}"
            )?;
        }
    }
    Ok(match services.family {
        Family::Ipv4 => text,
        Family::Ipv6 => text.replace(" ip ", " ip6 ").replace("ipv4_addr", "ipv6_addr"),
    })
}

/// Part of the nftables rules that does not depend on Services.
const NFTABLES: &str = "\
add table ip kube-proxy
add set ip kube-proxy cluster-ips { type ipv4_addr ; }
add set ip kube-proxy nodeport-ips { type ipv4_addr ; }
add set ip kube-proxy hairpin-connections { type ipv4_addr . ipv4_addr . inet_proto . inet_service ; }
add map ip kube-proxy firewall-ips { type ipv4_addr . inet_proto . inet_service : verdict ; }
add map ip kube-proxy no-endpoint-nodeports { type inet_proto . inet_service : verdict ; }
add map ip kube-proxy no-endpoint-services { type ipv4_addr . inet_proto . inet_service : verdict ; }
add map ip kube-proxy service-ips { type ipv4_addr . inet_proto . inet_service : verdict ; }
add map ip kube-proxy service-nodeports { type inet_proto . inet_service : verdict ; }
add chain ip kube-proxy filter-prerouting-pre-dnat { type filter hook prerouting priority -110 ; }
add chain ip kube-proxy filter-output-pre-dnat { type filter hook output priority -110 ; }
add chain ip kube-proxy filter-input { type filter hook input priority 0 ; }
add chain ip kube-proxy filter-forward { type filter hook forward priority 0 ; }
add chain ip kube-proxy filter-output { type filter hook output priority 0 ; }
add chain ip kube-proxy nat-prerouting { type nat hook prerouting priority -100 ; }
add chain ip kube-proxy nat-output { type nat hook output priority -100 ; }
add chain ip kube-proxy nat-postrouting { type nat hook postrouting priority 100 ; }
add chain ip kube-proxy cluster-ips-check
add chain ip kube-proxy firewall-check
add chain ip kube-proxy masquerading
add chain ip kube-proxy nodeport-endpoints-check
add chain ip kube-proxy reject-chain
add chain ip kube-proxy services
add chain ip kube-proxy service-endpoints-check
add rule ip kube-proxy filter-prerouting-pre-dnat ct state new jump firewall-check
add rule ip kube-proxy filter-output-pre-dnat ct state new jump firewall-check
add rule ip kube-proxy filter-input ct state new jump nodeport-endpoints-check
add rule ip kube-proxy filter-input ct state new jump service-endpoints-check
add rule ip kube-proxy filter-forward ct state new jump service-endpoints-check
add rule ip kube-proxy filter-forward ct state new jump cluster-ips-check
add rule ip kube-proxy filter-output ct state new jump service-endpoints-check
add rule ip kube-proxy filter-output ct state new jump cluster-ips-check
add rule ip kube-proxy nat-prerouting jump services
add rule ip kube-proxy nat-output jump services
add rule ip kube-proxy nat-postrouting jump masquerading
add rule ip kube-proxy cluster-ips-check ip daddr @cluster-ips reject
add rule ip kube-proxy firewall-check ip daddr . meta l4proto . th dport vmap @firewall-ips
add rule ip kube-proxy masquerading mark and MARK != 0 mark set mark xor MARK masquerade fully-random
add rule ip kube-proxy masquerading ct status dnat ip saddr . ip daddr . meta l4proto . th dport @hairpin-connections masquerade fully-random
add rule ip kube-proxy nodeport-endpoints-check ip daddr @nodeport-ips meta l4proto . th dport vmap @no-endpoint-nodeports
add rule ip kube-proxy service-endpoints-check ip daddr . meta l4proto . th dport vmap @no-endpoint-services
add rule ip kube-proxy reject-chain reject
add rule ip kube-proxy services ip daddr @cluster-ips ip saddr != CLUSTER mark set mark or MARK
add rule ip kube-proxy services ip daddr . meta l4proto . th dport vmap @service-ips
add rule ip kube-proxy services ip daddr @nodeport-ips meta l4proto . th dport vmap @service-nodeports
";

fn iptables(services: Services, node_ports: &[NodePort]) -> Result<String> {
    let large = services.number * services.endpoints > LARGE_CLUSTER;
    let comment = |text: &str| {
        if large {
            String::new()
        } else {
            format!("-m comment --comment \"{text}\" ")
        }
    };
    let cidr = cluster_cidr(services.family);
    let (mut chains, mut rules) = (String::new(), String::new());
    for service in 0..services.number {
        let (vip, name) = (services.vip(service), objects::name(service) + ":http");
        let chain = format!("KUBE-SVC-{service:016X}");
        let captured =
            format!("-m comment --comment \"{name} cluster IP\" -m tcp -p tcp -d {vip} --dport {SERVICE_PORT}");
        writeln!(chains, ":{chain} - [0:0]")?;
        writeln!(
            rules,
            "-A KUBE-SERVICES {captured} -j {chain}\n-A {chain} {captured} ! -s {cidr} -j KUBE-MARK-MASQ"
        )?;
        for (i, backend) in (0..).zip(backends(services, service)) {
            let (address, endpoint) = (services.backend(backend), format!("KUBE-SEP-{backend:016X}"));
            let to = SocketAddr::new(address, BACKEND_PORT);
            let left = services.endpoints - i;
            let random = if left == 1 {
                String::new()
            } else {
                format!(
                    "-m statistic --mode random --probability {:.10} ",
                    1.0 / f64::from(left)
                )
            };
            writeln!(chains, ":{endpoint} - [0:0]")?;
            writeln!(
                rules,
                "-A {chain} {}{random}-j {endpoint}\n\
                 -A {endpoint} {which}-s {address} -j KUBE-MARK-MASQ\n\
                 -A {endpoint} {which}-m tcp -p tcp -j DNAT --to-destination {to}",
                comment(&format!("{name} -> {to}")),
                which = comment(&name),
            )?;
        }
    }
    for (number, node_port) in node_ports.iter().enumerate() {
        let NodePort { vip, port, backend, .. } = node_port;
        let name = format!("{}:http", node_port.name);
        let (id, to) = (format!("NODE{number:012}"), SocketAddr::new(*backend, BACKEND_PORT));
        let captured =
            format!("-m comment --comment \"{name} cluster IP\" -m tcp -p tcp -d {vip} --dport {SERVICE_PORT}");
        writeln!(
            chains,
            ":KUBE-SVC-{id} - [0:0]\n:KUBE-EXT-{id} - [0:0]\n:KUBE-SEP-{id} - [0:0]"
        )?;
        writeln!(
            rules,
            "-A KUBE-SERVICES {captured} -j KUBE-SVC-{id}\n\
             -A KUBE-NODEPORTS -m comment --comment {name} -m tcp -p tcp --dport {port} -j KUBE-EXT-{id}\n\
             -A KUBE-EXT-{id} {masquerade}-j KUBE-MARK-MASQ\n\
             -A KUBE-EXT-{id} -j KUBE-SVC-{id}\n\
             -A KUBE-SVC-{id} {captured} ! -s {cidr} -j KUBE-MARK-MASQ\n\
             -A KUBE-SVC-{id} {}-j KUBE-SEP-{id}\n\
             -A KUBE-SEP-{id} {which}-s {backend} -j KUBE-MARK-MASQ\n\
             -A KUBE-SEP-{id} {which}-m tcp -p tcp -j DNAT --to-destination {to}",
            comment(&format!("{name} -> {to}")),
            masquerade = format_args!("-m comment --comment \"masquerade traffic for {name} external destinations\" "),
            which = comment(&name),
        )?;
    }
    let base = match services.family {
        Family::Ipv4 => IPTABLES.replace("LOCALNET\n", LOCALNET),
        Family::Ipv6 => IPTABLES.replace("LOCALNET\n", ""),
    };
    Ok(base
        .replace("MARK_VALUE", MARK)
        .replace("SERVICE_CHAINS\n", &chains)
        .replace("SERVICE_RULES\n", &rules))
}

/// Part of the iptables rules that does not depend on Services, with placeholders for the part that does.
const IPTABLES: &str = "\
*filter
:KUBE-NODEPORTS - [0:0]
:KUBE-SERVICES - [0:0]
:KUBE-EXTERNAL-SERVICES - [0:0]
:KUBE-FIREWALL - [0:0]
:KUBE-FORWARD - [0:0]
:KUBE-PROXY-FIREWALL - [0:0]
-A INPUT -m conntrack --ctstate NEW -m comment --comment \"load balancer firewall\" -j KUBE-PROXY-FIREWALL
-A INPUT -m comment --comment \"health check ports\" -j KUBE-NODEPORTS
-A INPUT -m conntrack --ctstate NEW -m comment --comment \"externally visible portals\" -j KUBE-EXTERNAL-SERVICES
-A INPUT -j KUBE-FIREWALL
-A FORWARD -m conntrack --ctstate NEW -m comment --comment \"load balancer firewall\" -j KUBE-PROXY-FIREWALL
-A FORWARD -m comment --comment \"forwarding rules\" -j KUBE-FORWARD
-A FORWARD -m conntrack --ctstate NEW -m comment --comment \"service portals\" -j KUBE-SERVICES
-A FORWARD -m conntrack --ctstate NEW -m comment --comment \"externally visible portals\" -j KUBE-EXTERNAL-SERVICES
-A OUTPUT -m conntrack --ctstate NEW -m comment --comment \"load balancer firewall\" -j KUBE-PROXY-FIREWALL
-A OUTPUT -m conntrack --ctstate NEW -m comment --comment \"service portals\" -j KUBE-SERVICES
-A OUTPUT -j KUBE-FIREWALL
LOCALNET
-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP
-A KUBE-FORWARD -m comment --comment \"forwarding rules\" -m mark --mark MARK_VALUE/MARK_VALUE -j ACCEPT
-A KUBE-FORWARD -m comment --comment \"forwarding conntrack rule\" -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
COMMIT
*nat
:KUBE-NODEPORTS - [0:0]
:KUBE-SERVICES - [0:0]
:KUBE-MARK-MASQ - [0:0]
:KUBE-POSTROUTING - [0:0]
SERVICE_CHAINS
-A PREROUTING -m comment --comment \"service portals\" -j KUBE-SERVICES
-A OUTPUT -m comment --comment \"service portals\" -j KUBE-SERVICES
-A POSTROUTING -m comment --comment \"postrouting rules\" -j KUBE-POSTROUTING
-A KUBE-MARK-MASQ -j MARK --or-mark MARK_VALUE
-A KUBE-POSTROUTING -m mark ! --mark MARK_VALUE/MARK_VALUE -j RETURN
-A KUBE-POSTROUTING -j MARK --xor-mark MARK_VALUE
-A KUBE-POSTROUTING -m comment --comment \"service traffic requiring SNAT\" -j MASQUERADE --random-fully
SERVICE_RULES
-A KUBE-SERVICES -m comment --comment \"node ports, always the last rule\" -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS
COMMIT
";

/// Part of the rules that only IPv4 has.
const LOCALNET: &str = "\
-A KUBE-FIREWALL -m comment --comment \"block incoming localnet connections\" -d 127.0.0.0/8 ! -s 127.0.0.0/8 -m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT -j DROP
";

#[cfg(test)]
mod tests {
    use super::*;
    use lb_core::model::Protocol;

    const SMALL: Services = Services {
        number: 2,
        endpoints: 3,
        family: Family::Ipv4,
        protocol: Protocol::Tcp,
    };

    #[test]
    fn nftables_sends_each_address_to_its_chain_and_that_to_its_endpoints() -> Result<()> {
        let text = nftables(SMALL, &[])?;
        let chain = "service-00000001-namespace-0/service-1/tcp/http";
        for line in [
            format!("add element ip kube-proxy service-ips {{ 10.96.0.2 . tcp . 80 : goto {chain} }}"),
            format!(
                "add rule ip kube-proxy {chain} meta l4proto tcp dnat ip addr . port to numgen random mod 3 map \
                 {{ 0 : 12.0.0.3 . 8080, 1 : 12.0.0.4 . 8080, 2 : 12.0.0.5 . 8080 }}"
            ),
        ] {
            assert!(text.lines().any(|l| l == line), "{line}\nis not in\n{text}");
        }
        assert_eq!(text.matches("add chain ip kube-proxy service-0").count(), 2);
        Ok(())
    }

    #[test]
    fn iptables_picks_each_endpoint_with_equal_chances() -> Result<()> {
        let text = iptables(SMALL, &[])?;
        let chances: Vec<_> = text
            .lines()
            .filter(|line| line.starts_with("-A KUBE-SVC-0000000000000001") && line.contains("KUBE-SEP"))
            .map(|line| {
                line.split_once("--probability ")
                    .map(|(_, rest)| rest.split(' ').next())
            })
            .collect();
        assert_eq!(chances, [Some(Some("0.3333333333")), Some(Some("0.5000000000")), None]);
        assert!(text.contains("-A KUBE-SERVICES -m comment --comment \"namespace-0/service-1:http cluster IP\" -m tcp -p tcp -d 10.96.0.2 --dport 80 -j KUBE-SVC-0000000000000001\n"));
        assert!(!text.contains("SERVICE_") && !text.contains("MARK_VALUE"));
        Ok(())
    }

    #[test]
    fn a_large_cluster_has_fewer_comments() -> Result<()> {
        let large = Services {
            number: 101,
            endpoints: 10,
            ..SMALL
        };
        assert!(iptables(SMALL, &[])?.contains(" -> 12.0.0.3:8080"));
        assert!(!iptables(large, &[])?.contains(" -> "));
        Ok(())
    }

    #[test]
    fn rules_of_ipv6_have_no_address_of_ipv4() -> Result<()> {
        let services = Services {
            family: Family::Ipv6,
            ..SMALL
        };
        let (nft, iptables) = (nftables(services, &[])?, iptables(services, &[])?);
        assert!(nft.contains(
            "add element ip6 kube-proxy service-ips { fd00:96::2 . tcp . 80 : goto \
             service-00000001-namespace-0/service-1/tcp/http }"
        ));
        assert!(iptables.contains("-j DNAT --to-destination [fd00:12::3]:8080\n"));
        for text in [nft, iptables] {
            assert!(!text.contains("10.10.") && !text.contains("127.0.0") && !text.contains(" ip "));
        }
        Ok(())
    }

    #[test]
    fn a_node_port_is_masqueraded_and_goes_where_its_service_does() -> Result<()> {
        let node_port = NodePort {
            name: "default/web".to_owned(),
            vip: IpAddr::from([10, 97, 0, 1]),
            node: IpAddr::from([192, 168, 77, 1]),
            port: 30080,
            backend: IpAddr::from([10, 10, 1, 2]),
            is_local: true,
        };
        let node_ports = [node_port];
        let (nft, iptables) = (nftables(SMALL, &node_ports)?, iptables(SMALL, &node_ports)?);
        for line in [
            "add element ip kube-proxy service-nodeports { tcp . 30080 : goto external-NODE0000-default/web/tcp/http }",
            "add rule ip kube-proxy external-NODE0000-default/web/tcp/http goto service-NODE0000-default/web/tcp/http",
            "add element ip kube-proxy nodeport-ips { 192.168.77.1 }",
        ] {
            assert!(nft.lines().any(|l| l == line), "{line}\nis not in\n{nft}");
        }
        let rule = "-A KUBE-NODEPORTS -m comment --comment default/web:http -m tcp -p tcp --dport 30080 -j KUBE-EXT-NODE000000000000";
        assert!(iptables.lines().any(|l| l == rule), "{rule}\nis not in\n{iptables}");
        Ok(())
    }
}
