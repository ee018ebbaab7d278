//! Manifests, good and bad, through the whole source.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::Duration;

use proptest::prelude::*;
use tempfile::TempDir;

use super::manifests::{MAX_FILE_BYTES, ManifestSource};
use super::watch::Watcher;
use lb_core::model::{Batch, Change, Kind, Object, ObjectId, ObjectKey, Service};

/// A good Service.
fn service(name: &str, port: u16) -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata:\n  name: {name}\nspec:\n  clusterIP: 10.96.0.1\n  ports:\n  - port: {port}\n"
    )
}

/// A Service of which one line of `spec` is replaced.
fn with_ports(ports: &str) -> String {
    format!("apiVersion: v1\nkind: Service\nmetadata:\n  name: bad\nspec:\n  clusterIP: 10.96.0.2\n  ports:\n{ports}")
}

fn with_spec(spec: &str) -> String {
    format!("apiVersion: v1\nkind: Service\nmetadata:\n  name: bad\nspec:\n  ports:\n  - port: 80\n  {spec}\n")
}

/// A slice of one endpoint, given as YAML.
fn slice(family: &str, endpoint: &str) -> String {
    format!(
        "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata:\n  name: bad\n  labels:\n    \
         kubernetes.io/service-name: web\naddressType: {family}\nendpoints:\n- {endpoint}\nports:\n- port: 8080\n"
    )
}

struct Bed {
    dir: TempDir,
    source: ManifestSource,
    /// The sum of the batches.
    state: BTreeMap<ObjectId, Object>,
}

impl Bed {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let source = ManifestSource::new(vec![dir.path().to_owned()]);
        let state = BTreeMap::new();
        Self { dir, source, state }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn write(&self, name: &str, text: impl AsRef<[u8]>) {
        fs::write(self.path(name), text).unwrap();
    }

    fn rescan(&mut self) -> Batch {
        let batch = self.source.rescan();
        assert_eq!(batch.complete, batch.problems.is_empty());
        let mut ids = Vec::new();
        for change in &batch.changes {
            match change {
                Change::Set(object) => {
                    ids.push(object.id());
                    assert_ne!(self.state.insert(object.id(), object.clone()).as_ref(), Some(object));
                }
                Change::Remove(id) => {
                    ids.push(id.clone());
                    assert!(self.state.remove(id).is_some());
                }
            }
        }
        let count = ids.len();
        ids.sort();
        ids.dedup();
        assert_eq!(ids.len(), count, "one change per object");
        batch
    }

    fn service(&self, name: &str) -> Option<&Service> {
        let id = ObjectId {
            kind: Kind::Service,
            key: ObjectKey::new("default", name),
        };
        match self.state.get(&id) {
            Some(Object::Service(service)) => Some(service),
            _ => None,
        }
    }

    fn port(&self, name: &str) -> Option<u16> {
        self.service(name).map(|service| service.ports[0].port)
    }
}

/// Bad documents, each with the line (within it) and the beginning of the message.
fn broken() -> Vec<(&'static str, String, usize, &'static str)> {
    let long = "a".repeat(64);
    vec![
        ("port 0", with_ports("  - port: 0\n"), 8, "spec.ports[0].port: 0 is not in 1..=65535"),
        ("no port", with_ports("  - name: a\n"), 8, "spec.ports[0].port: 0 is not in 1..=65535"),
        (
            "port 70000",
            with_ports("  - name: a\n    port: 80\n  - name: b\n    port: 70000\n"),
            11,
            "spec.ports[1].port: 70000 is not in 1..=65535",
        ),
        ("negative port", with_ports("  - port: -1\n"), 8, "spec.ports[0].port: -1 is not in 1..=65535"),
        ("huge port", with_ports("  - port: 99999999999\n"), 8, "spec.ports[0].port: "),
        ("wrong type", with_ports("  - port: http\n"), 8, "spec.ports[0].port: invalid type: string \"http\""),
        ("quoted port", with_ports("  - port: \"80\"\n"), 8, "spec.ports[0].port: invalid type: string \"80\""),
        ("float port", with_ports("  - port: 80.5\n"), 8, "spec.ports[0].port: invalid type"),
        ("number as name", with_ports("  - port: 80\n    name: 80\n"), 9, "spec.ports[0].name: invalid type"),
        ("ports is a mapping", with_ports("    port: 80\n"), 8, "spec.ports: invalid type: map"),
        ("no ports", with_ports(""), 7, "spec.ports: missing"),
        (
            "duplicate port name",
            with_ports("  - {name: a, port: 80}\n  - {name: a, port: 81}\n"),
            9,
            "spec.ports[1].name: \"a\" is there twice",
        ),
        (
            "duplicate port",
            with_ports("  - {name: a, port: 80}\n  - {name: b, port: 80}\n"),
            9,
            "spec.ports[1].port: \"80/TCP\" is there twice",
        ),
        (
            "unnamed port",
            with_ports("  - {name: a, port: 80}\n  - {port: 81}\n"),
            9,
            "spec.ports[1].name: missing",
        ),
        (
            "long port name",
            with_ports(&format!("  - port: 80\n    name: {long}\n")),
            9,
            "spec.ports[0].name: \"aaaa",
        ),
        (
            "bad protocol",
            with_ports("  - port: 80\n    protocol: tcp\n"),
            9,
            "spec.ports[0].protocol: \"tcp\" is not one of TCP, UDP, SCTP",
        ),
        (
            "bad address",
            with_spec("clusterIPs: [\"10.96.0.300\"]"),
            8,
            "spec.clusterIPs[0]: \"10.96.0.300\" is not an IP address",
        ),
        ("leading zero", with_spec("clusterIP: 10.96.0.010"), 8, "spec.clusterIP: \"10.96.0.010\" is not an IP address"),
        ("loopback", with_spec("clusterIP: 127.0.0.1"), 8, "spec.clusterIP: 127.0.0.1 is a loopback address"),
        ("unspecified", with_spec("clusterIP: 0.0.0.0"), 8, "spec.clusterIP: 0.0.0.0 is the unspecified address"),
        (
            "same family",
            with_spec("clusterIPs:\n  - 10.0.0.1\n  - 10.0.0.2"),
            10,
            "spec.clusterIPs[1]: 10.0.0.2 is a second address of the same family",
        ),
        ("type", with_spec("type: ClusterIp"), 8, "spec.type: \"ClusterIp\" is not one of ClusterIP,"),
        ("affinity", with_spec("sessionAffinity: Client"), 8, "spec.sessionAffinity: \"Client\" is not one of"),
        ("policy", with_spec("internalTrafficPolicy: local"), 8, "spec.internalTrafficPolicy: \"local\" is not one of"),
        (
            "affinity timeout",
            with_spec("sessionAffinity: ClientIP\n  sessionAffinityConfig: {clientIP: {timeoutSeconds: 86401}}"),
            9,
            "spec.sessionAffinityConfig.clientIP.timeoutSeconds: 86401 is not in 1..=86400",
        ),
        ("no name", "apiVersion: v1\nkind: Service\nmetadata: {}\n".into(), 3, "metadata.name: missing"),
        ("no metadata", "apiVersion: v1\nkind: Service\n".into(), 1, "metadata.name: missing"),
        (
            "long name",
            service(&long, 80),
            4,
            "metadata.name: \"aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa\" is longer than 63 bytes",
        ),
        ("bad name", service("Web_1", 80), 4, "metadata.name: \"Web_1\" is not a DNS label"),
        ("no spec", "apiVersion: v1\nkind: Service\nmetadata:\n  name: bad\n".into(), 1, "spec: missing"),
        ("no kind", "apiVersion: v1\nmetadata:\n  name: bad\n".into(), 1, "kind: missing"),
        ("no apiVersion", "kind: Service\nmetadata:\n  name: bad\n".into(), 1, "apiVersion: missing"),
        ("kind is a list", "apiVersion: v1\nkind: [Service]\n".into(), 2, "kind: is not a string"),
        ("unknown kind", "apiVersion: v1\nkind: Srevice\n".into(), 2, "kind: unknown kind \"Srevice\" of \"v1\""),
        (
            "unknown discovery kind",
            "apiVersion: discovery.k8s.io/v1\nkind: EndpointsSlice\n".into(),
            2,
            "kind: unknown kind \"EndpointsSlice\"",
        ),
        (
            "wrong version",
            "apiVersion: discovery.k8s.io/v1beta1\nkind: EndpointSlice\n".into(),
            1,
            "apiVersion: \"discovery.k8s.io/v1beta1\" is not discovery.k8s.io/v1",
        ),
        (
            "family mismatch",
            slice("IPv4", "addresses: [\"fd00::1\"]"),
            9,
            "endpoints[0].addresses[0]: fd00::1 is not an IPv4 address",
        ),
        ("no addresses", slice("IPv4", "addresses: []"), 9, "endpoints[0].addresses: missing"),
        (
            "endpoint is loopback",
            slice("IPv4", "addresses: [127.0.0.1]"),
            9,
            "endpoints[0].addresses[0]: 127.0.0.1 is a loopback address",
        ),
        (
            "endpoint is link-local",
            slice("IPv6", "addresses: [\"fe80::1\"]"),
            9,
            "endpoints[0].addresses[0]: fe80::1 is a link-local address",
        ),
        (
            "endpoint is multicast",
            slice("IPv4", "addresses: [224.0.0.5]"),
            9,
            "endpoints[0].addresses[0]: 224.0.0.5 is a multicast address",
        ),
        ("address type", slice("IPv5", "addresses: [10.0.0.1]"), 7, "addressType: \"IPv5\" is not one of"),
        (
            "bad CIDR",
            "apiVersion: v1\nkind: Node\nmetadata:\n  name: n\nspec:\n  podCIDRs:\n  - 10.0.0.0/33\n".into(),
            7,
            "spec.podCIDRs[0]: \"10.0.0.0/33\" is not a CIDR",
        ),
        ("half-written", "apiVersion: v1\nkind: Service\nmetadata:\n  name: ba".into(), 1, "spec: missing"),
        ("tab", "apiVersion: v1\nkind: Service\nmetadata:\n\tname: bad\n".into(), 4, ""),
        ("indent", "apiVersion: v1\nkind: Service\nmetadata:\n    name: a\n  labels: {}\n".into(), 5, ""),
        ("unterminated quote", "apiVersion: v1\nkind: \"Service\nmetadata:\n  name: a\n".into(), 0, ""),
        ("unterminated flow", "apiVersion: v1\nkind: Service\nmetadata: {name: a\n".into(), 0, ""),
        ("NUL", "apiVersion: v1\nkind: Service\n\0\n".into(), 3, "control character U+0000"),
        ("duplicate key", "apiVersion: v1\nkind: Service\nkind: Service\n".into(), 3, "\"kind\" is there twice"),
        ("deep", format!("apiVersion: v1\nkind: Service\nx: {}\n", "[".repeat(5000)), 3, ""),
        ("deep block", format!("apiVersion: v1\nkind: Service\nx:\n  {}a\n", "- ".repeat(5000)), 0, ""),
        (
            "huge scalar",
            service(&"x".repeat(5_000_000), 80),
            4,
            "metadata.name: \"xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx\"... is longer",
        ),
        ("laughs", laughs(), 0, ""),
        ("unknown anchor", "apiVersion: v1\nkind: *nothing\n".into(), 2, ""),
        ("scalar", "Service\n".into(), 1, ""),
        ("list", "- apiVersion: v1\n  kind: Service\n".into(), 1, ""),
        ("null", "null\n".into(), 1, "not an API object"),
        ("bad JSON", "{\"apiVersion\": \"v1\",\n \"kind\": }}\n".into(), 2, ""),
        ("JSON, duplicate key", "{\"kind\": \"a\",\n \"kind\": \"b\"}\n".into(), 2, "\"kind\" is there twice"),
        (
            "JSON, port",
            "{\"apiVersion\": \"v1\", \"kind\": \"Service\", \"metadata\": {\"name\": \"bad\"}, \"spec\": {\n\"ports\": [\n{\"port\": 70000}]}}\n".into(),
            3,
            "spec.ports[0].port: 70000 is not in",
        ),
        (
            "List with a bad item",
            "apiVersion: v1\nitems:\n- apiVersion: v1\n  kind: Service\n  metadata:\n    name: bad\n  spec:\n    ports:\n    - port: 70000\nkind: List\n".into(),
            9,
            "items[0].spec.ports[0].port: 70000 is not in",
        ),
        ("items of a List", "apiVersion: v1\nkind: List\nitems: 5\n".into(), 3, "items: is not a list"),
        ("List in a List", "apiVersion: v1\nkind: List\nitems:\n- {apiVersion: v1, kind: List}\n".into(), 4, "items[0].kind: a List"),
    ]
}

fn laughs() -> String {
    let mut text = "apiVersion: v1\nkind: Service\na0: &a0 [x, x, x, x, x, x, x, x, x, x]\n".to_owned();
    for i in 1..12 {
        let all = vec![format!("*a{}", i - 1); 10].join(", ");
        text.push_str(&format!("a{i}: &a{i} [{all}]\n"));
    }
    text
}

#[test]
fn a_limit_of_the_parser_is_explained_in_words() {
    let problem = super::parse::parse("a.yaml", laughs().as_bytes(), false)
        .problems
        .remove(0);
    let message = "too large or too deep for a manifest: ";
    assert!(problem.message.starts_with(message), "{problem}");
    assert!(!problem.message.contains(['{', '}']), "{problem}");
}

#[test]
fn every_broken_document_is_named_and_hides_no_other() {
    let mut wrong = Vec::new();
    for (what, text, line, message) in broken() {
        let mut bed = Bed::new();
        let first = service("first", 80);
        let newline = if text.ends_with('\n') { "" } else { "\n" };
        bed.write(
            "a.yaml",
            format!("{first}---\n{text}{newline}---\n{}", service("last", 81)),
        );
        bed.write("b.yml", service("other", 82));
        let batch = bed.rescan();
        assert_eq!(batch.problems.len(), 1, "{what}: {:?}", batch.problems);
        let problem = &batch.problems[0];
        let start = first.lines().count() + 2;
        let file = bed.path("a.yaml").display().to_string();
        let place = format!("{file}: document 2 (line ");
        assert!(problem.place.starts_with(&place), "{what}: {problem}");
        let at = if line > 0 {
            format!("{place}{})", start + line - 1)
        } else {
            place
        };
        if !problem.place.starts_with(&at) || !problem.message.starts_with(message) {
            wrong.push(format!("{what}: {problem}\n    instead of {at}: {message}"));
        }
        assert!(!problem.message.is_empty() && problem.message.len() < 1000, "{what}");
        let ports = (bed.port("first"), bed.port("last"), bed.port("other"));
        assert_eq!(ports, (Some(80), Some(81), Some(82)), "{what}");
        assert_eq!(bed.state.len(), 3, "{what}");
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(broken().len() >= 20);
}

#[test]
fn bytes_that_are_not_text() {
    let mut bed = Bed::new();
    let mut bytes = service("a", 80).into_bytes();
    bytes.extend_from_slice(b"---\napiVersion: v1\nkind: \xff\xfe\n---\n");
    bytes.extend_from_slice(service("b", 81).as_bytes());
    bed.write("x.yaml", bytes);
    let batch = bed.rescan();
    assert_eq!(batch.problems.len(), 1);
    assert!(
        batch.problems[0].place.ends_with("x.yaml: document 2 (line 11)"),
        "{:?}",
        batch.problems
    );
    assert_eq!(batch.problems[0].message, "not UTF-8");
    assert_eq!((bed.port("a"), bed.port("b")), (Some(80), Some(81)));
}

#[test]
fn files_that_are_no_files() {
    let mut bed = Bed::new();
    bed.write("good.yaml", service("good", 80));
    bed.write("empty.yaml", "");
    bed.write("comments.yaml", "# nothing\n---\n# more\n---\n");
    fs::File::create(bed.path("huge.yaml"))
        .unwrap()
        .set_len(MAX_FILE_BYTES + 1)
        .unwrap();
    symlink("nowhere", bed.path("dangling.yaml")).unwrap();
    let fifo = std::process::Command::new("mkfifo")
        .arg(bed.path("fifo.yaml"))
        .status()
        .unwrap();
    assert!(fifo.success());
    fs::create_dir(bed.path("folder.yaml")).unwrap();
    bed.write(".hidden.yaml", "nonsense");
    bed.write("note.txt", "nonsense");
    let batch = bed.rescan();
    let problems: Vec<_> = batch
        .problems
        .iter()
        .map(|p| {
            (
                Path::new(&p.place).file_name().unwrap().to_str().unwrap(),
                p.message.as_str(),
            )
        })
        .collect();
    let names: Vec<_> = problems.iter().map(|(name, _)| *name).collect();
    assert_eq!(
        names,
        ["comments.yaml", "dangling.yaml", "empty.yaml", "fifo.yaml", "huge.yaml"]
    );
    assert!(problems[0].1.starts_with("the file holds no document"));
    assert!(problems[2].1.starts_with("the file is empty"));
    assert_eq!(problems[3].1, "not a regular file");
    assert_eq!(problems[4].1, "larger than 256 MiB");
    assert_eq!(bed.state.len(), 1);
}

#[test]
fn paths_that_are_not_there() {
    let dir = tempfile::tempdir().unwrap();
    let missing = dir.path().join("missing");
    let good = dir.path().join("good.yaml");
    fs::write(&good, service("good", 80)).unwrap();
    let mut source = ManifestSource::new(vec![missing.clone(), good]);
    let batch = source.rescan();
    assert_eq!(batch.problems[0].place, missing.display().to_string());
    assert_eq!(
        (batch.changes.len(), batch.problems.len(), batch.complete),
        (1, 1, false)
    );
}

#[test]
fn nothing_changes_twice() {
    let mut bed = Bed::new();
    bed.write("a.yaml", service("a", 80));
    assert_eq!(bed.rescan().changes.len(), 1);
    assert_eq!(
        bed.rescan(),
        Batch {
            complete: true,
            ..Batch::default()
        }
    );
    // Different text with the same meaning.
    bed.write("a.yaml", format!("# comment\n{}", service("a", 80)));
    assert_eq!(
        bed.rescan(),
        Batch {
            complete: true,
            ..Batch::default()
        }
    );
    std::thread::sleep(Duration::from_millis(60));
    assert!(bed.rescan().changes.is_empty());
    assert!(
        bed.source
            .rescan_forced(&[bed.path("a.yaml"), bed.dir.path().to_owned()])
            .changes
            .is_empty()
    );
}

#[test]
fn the_last_good_state_stays() {
    let mut bed = Bed::new();
    bed.write("a.yaml", format!("{}---\n{}", service("a", 80), service("b", 81)));
    assert!(bed.rescan().complete);
    // A problem in one document keeps the whole file as it was.
    bed.write("a.yaml", format!("{}---\n{}", service("a", 8080), service("B", 81)));
    let batch = bed.rescan();
    assert!(batch.changes.is_empty() && batch.problems.len() == 1);
    // It stays a problem without another change of the file.
    assert_eq!(bed.rescan().problems, batch.problems);
    // Truncated by an editor: the last good version stays.
    bed.write("a.yaml", "");
    assert!(bed.rescan().changes.is_empty());
    bed.write("a.yaml", service("a", 8080));
    let batch = bed.rescan();
    assert!(batch.complete);
    assert_eq!((bed.port("a"), bed.port("b")), (Some(8080), None));
    assert_eq!(batch.changes.len(), 2);
    // Never without problems: its good documents are served and followed.
    bed.write("c.yaml", format!("{}---\nkind: x\n", service("c", 1)));
    assert_eq!(bed.rescan().problems.len(), 1);
    assert_eq!(bed.port("c"), Some(1));
    bed.write("c.yaml", format!("{}---\nkind: x\n", service("c", 2)));
    assert_eq!(bed.rescan().problems.len(), 1);
    assert_eq!(bed.port("c"), Some(2));
    fs::remove_file(bed.path("c.yaml")).unwrap();
    assert!(bed.rescan().complete);
    assert_eq!(bed.port("c"), None);
}

#[test]
fn the_first_definition_wins() {
    let mut bed = Bed::new();
    bed.write("b.yaml", service("a", 2));
    assert!(bed.rescan().complete);
    bed.write("a.yaml", service("a", 1));
    bed.write("c.yaml", service("a", 3));
    let batch = bed.rescan();
    assert_eq!(bed.port("a"), Some(1));
    let places: Vec<_> = batch.problems.iter().map(|p| p.place.clone()).collect();
    let place = |name: &str| format!("{}: document 1 (line 1)", bed.path(name).display());
    assert_eq!(places, [place("b.yaml"), place("c.yaml")]);
    assert!(
        batch.problems[0]
            .message
            .contains("Service default/a is defined already in"),
        "{:?}",
        batch.problems
    );
    fs::remove_file(bed.path("a.yaml")).unwrap();
    bed.rescan();
    assert_eq!(bed.port("a"), Some(2));
    fs::remove_file(bed.path("c.yaml")).unwrap();
    assert!(bed.rescan().complete);
    // In one file.
    bed.write("d.yaml", format!("{}---\n{}", service("d", 1), service("d", 2)));
    let batch = bed.rescan();
    assert_eq!(batch.problems.len(), 1);
    assert!(
        batch.problems[0].place.ends_with("d.yaml: document 2 (line 10)"),
        "{:?}",
        batch.problems
    );
    assert_eq!(bed.port("d"), Some(1));
}

#[test]
fn the_order_of_paths_counts_before_names() {
    let dir = tempfile::tempdir().unwrap();
    let (z, a) = (dir.path().join("z.yaml"), dir.path().join("a.yaml"));
    fs::write(&z, service("x", 1)).unwrap();
    fs::write(&a, service("x", 2)).unwrap();
    // The folder contains both files again, which is no contradiction.
    let batch = ManifestSource::new(vec![z, a.clone(), dir.path().to_owned()]).rescan();
    assert_eq!(batch.problems.len(), 1, "{:?}", batch.problems);
    assert!(batch.problems[0].place.starts_with(&a.display().to_string()));
    let [Change::Set(Object::Service(service))] = &batch.changes[..] else {
        panic!("{:?}", batch.changes);
    };
    assert_eq!(service.ports[0].port, 1);
}

#[test]
fn a_file_that_is_gone_takes_its_objects_and_a_folder_does_not() {
    let outer = tempfile::tempdir().unwrap();
    let (file, folder) = (outer.path().join("f.yaml"), outer.path().join("d"));
    fs::create_dir(&folder).unwrap();
    fs::write(&file, service("f", 80)).unwrap();
    fs::write(folder.join("x.yaml"), service("x", 80)).unwrap();
    let mut source = ManifestSource::new(vec![file.clone(), folder.clone()]);
    assert_eq!(source.rescan().changes.len(), 2);
    fs::remove_file(&file).unwrap();
    let moved = outer.path().join("moved");
    fs::rename(&folder, &moved).unwrap();
    let batch = source.rescan();
    assert_eq!(batch.problems.len(), 2);
    let [Change::Remove(id)] = &batch.changes[..] else {
        panic!("{:?}", batch.changes);
    };
    assert_eq!(id.key, ObjectKey::new("default", "f"));
    fs::rename(&moved, &folder).unwrap();
    fs::remove_file(folder.join("x.yaml")).unwrap();
    assert_eq!(source.rescan().changes.len(), 1);
}

#[test]
fn a_config_map_is_swapped_at_once() {
    let mut bed = Bed::new();
    let swap = |version: &str, port: u16| {
        fs::create_dir(bed.path(version)).unwrap();
        fs::write(bed.path(version).join("s.yaml"), service("s", port)).unwrap();
        symlink(version, bed.path("..tmp")).unwrap();
        fs::rename(bed.path("..tmp"), bed.path("..data")).unwrap();
    };
    swap("..v1", 80);
    symlink("..data/s.yaml", bed.path("s.yaml")).unwrap();
    swap("..v2", 81);
    assert!(bed.rescan().complete);
    assert_eq!(bed.port("s"), Some(81));
    fs::create_dir(bed.path("..v3")).unwrap();
    fs::write(bed.path("..v3/s.yaml"), service("s", 82)).unwrap();
    symlink("..v3", bed.path("..tmp")).unwrap();
    fs::rename(bed.path("..tmp"), bed.path("..data")).unwrap();
    assert_eq!(bed.rescan().changes.len(), 1);
    assert_eq!(bed.port("s"), Some(82));
}

const FULL: &str = r#"%YAML 1.2
---
# A cluster in one file.
apiVersion: v1
kind: Service
metadata:
  name: web
  namespace: shop
  creationTimestamp: "2026-01-02T03:04:05Z"
  labels: {service.kubernetes.io/service-proxy-name: other, service.kubernetes.io/headless: ""}
spec:
  type: NodePort
  clusterIP: 10.96.0.9
  clusterIPs: [10.96.0.10, "fd00::10"]
  sessionAffinity: ClientIP
  internalTrafficPolicy: Local
  publishNotReadyAddresses: true
  ports:
  - {name: http, port: 80, targetPort: 8080, nodePort: 30080}
  - {name: dns, port: 80, protocol: UDP, targetPort: dns}
...
---
{"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
	"metadata": {"name": "web-x.1", "namespace": "shop", "labels": {"kubernetes.io/service-name": "web"}},
	"endpoints": [
		{"addresses": ["10.0.0.1", "10.0.0.2"], "nodeName": "n1"},
		{"addresses": ["10.0.0.3"], "conditions": {"ready": false}},
		{"addresses": ["10.0.0.4"], "conditions": {"ready": false, "serving": true, "terminating": true}}],
	"ports": [{"name": "http", "port": 8080}, {"name": "dns", "protocol": "UDP"}]}
--- {apiVersion: v1, kind: Node, metadata: {name: n1}, spec: {podCIDR: 10.0.0.0/24},
 status: {addresses: [{type: InternalIP, address: 192.168.0.1}, {type: Hostname, address: n1}]}}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: whatever}
---
apiVersion: serving.knative.dev/v1
kind: Service
metadata: {name: theirs}
---
apiVersion: v1
kind: ConfigMap
data: {a: .inf, b: 1e999}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: fqdn, labels: {kubernetes.io/service-name: web}}
addressType: FQDN
endpoints: [{addresses: [example.org]}]
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: unlabelled}
addressType: IPv4
---
apiVersion: v1
items:
- metadata: {name: headless}
  spec: {clusterIP: None}
- apiVersion: v1
  kind: Service
  metadata: {name: pending}
  spec: {ports: [{port: 1}]}
kind: ServiceList
"#;

#[test]
fn what_is_good_is_read_as_it_is_meant() {
    use lb_core::model::{Protocol, ServiceType, TrafficPolicy};
    let mut bed = Bed::new();
    bed.write("all.yaml", FULL);
    // Several values in a row, and Windows line ends with a byte order mark.
    bed.write(
        "all.json",
        "{\"apiVersion\":\"v1\",\"kind\":\"Pod\"}\n{\"apiVersion\":\"v1\",\"kind\":\"List\",\"items\":null}",
    );
    bed.write(
        "dos.yaml",
        format!("\u{feff}---\r\n{}---\r\n", service("dos", 80).replace('\n', "\r\n")),
    );
    let batch = bed.rescan();
    assert_eq!(batch.problems, []);
    let ids: Vec<_> = bed.state.keys().map(ToString::to_string).collect();
    assert_eq!(
        ids,
        [
            "Service default/dos",
            "Service default/headless",
            "Service default/pending",
            "Service shop/web",
            "EndpointSlice shop/web-x.1",
            "Node n1"
        ]
    );
    let objects: Vec<_> = bed.state.values().collect();
    let (Object::Service(web), Object::EndpointSlice(slice), Object::Node(node)) = (objects[3], objects[4], objects[5])
    else {
        panic!("{objects:?}");
    };
    assert_eq!(web.created, Some(1_767_323_045));
    assert_eq!(web.service_type, ServiceType::NodePort);
    assert_eq!(
        web.cluster_ips.iter().map(ToString::to_string).collect::<Vec<_>>(),
        ["10.96.0.10", "fd00::10"]
    );
    assert_eq!(web.affinity_timeout, Some(10_800));
    assert_eq!(
        (web.internal_policy, web.external_policy),
        (TrafficPolicy::Local, TrafficPolicy::Cluster)
    );
    assert!(web.other_proxy && web.headless_label);
    let ports: Vec<_> = web
        .ports
        .iter()
        .map(|p| (&*p.name, p.protocol, p.port, p.node_port))
        .collect();
    assert_eq!(
        ports,
        [
            ("http", Protocol::Tcp, 80, Some(30080)),
            ("dns", Protocol::Udp, 80, None)
        ]
    );
    assert_eq!(slice.service_key(), ObjectKey::new("shop", "web"));
    let endpoints: Vec<_> = slice
        .endpoints
        .iter()
        .map(|e| (e.address.to_string(), e.ready, e.serving, e.terminating))
        .collect();
    assert_eq!(
        endpoints,
        [
            ("10.0.0.1".to_owned(), true, true, false),
            ("10.0.0.3".to_owned(), false, false, false),
            ("10.0.0.4".to_owned(), false, true, true)
        ]
    );
    assert_eq!(
        slice.endpoints.iter().next().unwrap().location.node.as_deref(),
        Some("n1")
    );
    assert_eq!(slice.ports[1].port, None);
    assert_eq!(node.addresses.len(), 1);
    assert_eq!(node.pod_cidrs, ["10.0.0.0/24".parse().unwrap()]);
    assert!(bed.service("headless").unwrap().cluster_ips.is_empty());
}

#[test]
fn a_file_cut_off_anywhere() {
    for (name, text) in [("a.yaml", FULL), ("a.json", FULL)] {
        for end in 0..=text.len() {
            super::parse::parse(name, &text.as_bytes()[..end], name.ends_with("json"));
        }
    }
}

#[test]
fn problems_are_counted_and_cut() {
    let mut bed = Bed::new();
    bed.write("a.yaml", "---\nkind: x\n".repeat(1000));
    let batch = bed.rescan();
    assert_eq!(batch.problems.len(), 101);
    assert_eq!(batch.problems[100].message, "900 more problems");
}

#[test]
fn thousands_in_one_file() {
    let mut bed = Bed::new();
    let mut text = String::from("apiVersion: v1\nitems:\n");
    for i in 0..5000 {
        text.push_str(&format!(
            "- apiVersion: v1\n  kind: Service\n  metadata:\n    name: s{i}\n  spec:\n    ports:\n    - port: 80\n"
        ));
    }
    text.push_str("kind: List\n");
    bed.write("a.yaml", &text);
    assert_eq!(bed.rescan().changes.len(), 5000);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn arbitrary_bytes(bytes in proptest::collection::vec(any::<u8>(), 0..300), json: bool) {
        super::parse::parse("x", &bytes, json);
    }

    #[test]
    fn arbitrary_yaml(text in "([-{}\\[\\]:,&*!|>'\"#%@ \\n\\t.~<]|kind|apiVersion|v1|Service|a|items|List|---\\n|\\n  ){0,60}") {
        super::parse::parse("x", text.as_bytes(), false);
    }

    #[test]
    fn a_good_file_damaged(at in 0..FULL.len(), byte: u8, cut in 0..20_usize) {
        let mut bytes = FULL.as_bytes().to_vec();
        bytes[at] = byte;
        bytes.drain(at..(at + cut).min(FULL.len()));
        super::parse::parse("x", &bytes, false);
    }
}

/// Waits until a change names a path; a periodic scan does not count.
async fn told(watcher: &mut Watcher) -> Vec<PathBuf> {
    tokio::time::timeout(Duration::from_secs(20), next(watcher))
        .await
        .expect("a change")
}

/// The next change that names a path.
async fn next(watcher: &mut Watcher) -> Vec<PathBuf> {
    loop {
        let paths = watcher.changed().await;
        if !paths.is_empty() {
            return paths;
        }
    }
}

/// Asserts that no change is reported for a while.
async fn silent(watcher: &mut Watcher) {
    let told = tokio::time::timeout(Duration::from_millis(150), next(watcher)).await;
    assert!(told.is_err(), "{told:?}");
}

#[tokio::test]
async fn a_folder_is_watched() {
    let mut bed = Bed::new();
    let folder = bed.dir.path().to_owned();
    let mut watcher = Watcher::new(std::slice::from_ref(&folder));
    assert_eq!(watcher.degraded(), None);
    silent(&mut watcher).await;
    bed.write("a.yaml", service("a", 80));
    assert_eq!(told(&mut watcher).await, [bed.path("a.yaml")]);
    // Reading is no change.
    bed.rescan();
    silent(&mut watcher).await;
    // Files with other names are ignored.
    bed.write(".a.yaml.swp", "x");
    silent(&mut watcher).await;
    // Saved as editors save.
    fs::rename(bed.path(".a.yaml.swp"), bed.path("a.yaml")).unwrap();
    assert_eq!(told(&mut watcher).await, [bed.path("a.yaml")]);
    fs::remove_file(bed.path("a.yaml")).unwrap();
    assert_eq!(told(&mut watcher).await, [bed.path("a.yaml")]);
    // A ConfigMap.
    symlink("nowhere", bed.path("..tmp")).unwrap();
    fs::rename(bed.path("..tmp"), bed.path("..data")).unwrap();
    assert!(told(&mut watcher).await.contains(&folder));
    // Dropped while waiting, nothing is lost.
    let _ = tokio::time::timeout(Duration::ZERO, watcher.changed()).await;
    bed.write("b.yaml", "1");
    // (If this test was delayed long enough, the change has been reported by then.)
    let paths = match tokio::time::timeout(Duration::from_millis(1), next(&mut watcher)).await {
        Ok(paths) => paths,
        Err(_) => told(&mut watcher).await,
    };
    assert_eq!(paths, [bed.path("b.yaml")]);
}

#[tokio::test]
async fn a_file_and_the_target_of_a_link_are_watched() {
    let bed = Bed::new();
    let elsewhere = tempfile::tempdir().unwrap();
    fs::write(elsewhere.path().join("real"), "x").unwrap();
    symlink(elsewhere.path().join("real"), bed.path("link.yaml")).unwrap();
    let (file, link) = (bed.path("f.yaml"), bed.path("link.yaml"));
    let mut watcher = Watcher::new(&[file.clone(), link.clone()]);
    bed.write("other.yaml", "x");
    silent(&mut watcher).await;
    bed.write("f.yaml", "x");
    assert_eq!(told(&mut watcher).await, [file]);
    fs::write(elsewhere.path().join("real"), "y").unwrap();
    assert_eq!(told(&mut watcher).await, [link]);
}

#[tokio::test]
async fn a_folder_that_comes_back_is_watched_again() {
    let outer = tempfile::tempdir().unwrap();
    let folder = outer.path().join("d");
    let mut watcher = Watcher::new(std::slice::from_ref(&folder));
    for round in 0..3 {
        fs::create_dir(&folder).unwrap();
        assert!(told(&mut watcher).await.contains(&folder), "round {round}");
        fs::write(folder.join("a.yaml"), "x").unwrap();
        assert!(
            told(&mut watcher).await.contains(&folder.join("a.yaml")),
            "round {round}"
        );
        fs::remove_dir_all(&folder).unwrap();
        assert!(told(&mut watcher).await.contains(&folder), "round {round}");
        // Remaining events of the removal.
        while tokio::time::timeout(Duration::from_millis(100), watcher.changed())
            .await
            .is_ok()
        {}
    }
}

#[tokio::test]
async fn a_folder_behind_a_link_is_watched() {
    let outer = tempfile::tempdir().unwrap();
    let path = |name: &str| outer.path().join(name);
    fs::create_dir(path("one")).unwrap();
    fs::create_dir(path("two")).unwrap();
    symlink("one", path("link")).unwrap();
    let mut watcher = Watcher::new(&[path("link"), path("one")]);
    fs::write(path("one/a.yaml"), "x").unwrap();
    assert_eq!(told(&mut watcher).await, [path("link/a.yaml"), path("one/a.yaml")]);
    symlink("two", path("tmp")).unwrap();
    fs::rename(path("tmp"), path("link")).unwrap();
    assert!(told(&mut watcher).await.contains(&path("link")));
    fs::write(path("two/a.yaml"), "x").unwrap();
    assert_eq!(told(&mut watcher).await, [path("link/a.yaml")]);
}

#[tokio::test]
async fn the_clock_ticks_without_a_change() {
    let bed = Bed::new();
    let mut watcher = Watcher::new(&[bed.dir.path().to_owned()]);
    let told = tokio::time::timeout(Duration::from_secs(30), watcher.changed()).await;
    assert_eq!(told.unwrap(), Vec::<PathBuf>::new());
}

#[test]
fn no_depth_overflows_the_stack() {
    for (open, close, head) in [("[", "]", "x: "), ("{a: ", "}", "x: "), ("- ", "", "x:\n  ")] {
        for depth in [0, 60, 90, 99, 110, 10_000] {
            let text = format!(
                "apiVersion: v1\nkind: Pod\n{head}{}a{}\n",
                open.repeat(depth),
                close.repeat(depth)
            );
            let problems = super::parse::parse("x", text.as_bytes(), false).problems;
            assert_eq!(problems.len(), usize::from(depth > 99), "{open} {depth}: {problems:?}");
        }
    }
    for depth in [60, 100, 126, 10_000] {
        let text = format!(
            "{{\"apiVersion\": \"v1\", \"kind\": \"Pod\", \"x\": {}1{}}}",
            "{\"a\":".repeat(depth),
            "}".repeat(depth)
        );
        let problems = super::parse::parse("x", text.as_bytes(), true).problems;
        assert_eq!(problems.len(), usize::from(depth > 126), "{depth}: {problems:?}");
    }
}
