//! Random packets, sent to the programs in the kernel.

use std::env;
use std::time::{Duration, Instant};

use lb_agent::node::devices::Layer;
use lb_tests::{Random, scaled_count_above};

use super::*;

/// Variable with the number of seconds for random packets.
const SECONDS: &str = "LB_FUZZ_SECONDS";
const PACKETS: u64 = 6_000;
/// Smallest number of packets: about one of forty is dropped, and every verdict has to occur.
const LEAST_PACKETS: u64 = 1_000;
/// Node ports of a Service with a local backend, with a remote one, and without any, and a port that is no node port.
const PORTS: [u16; 4] = [30080, 30081, 30082, 30083];
const HOOKS: [(&str, &str); 5] = [
    (program_name::INGRESS, "eth0"),
    (program_name::INGRESS, "cni0"),
    (program_name::INGRESS, "flannel.1"),
    (program_name::EGRESS, "eth0"),
    (program_name::EGRESS, "cni0"),
];

/// Returns a valid packet: from few clients to few addresses, or back from a backend, so that many packets belong to a
/// flow.
fn valid_packet(fixture: &Fixture, random: &mut Random) -> TestPacket {
    let v6 = random.next_bool();
    let client_address = client(v6, 4000 + random.below(8) as u16);
    let backend = SocketAddr::new(fixture.pod(["n1", "n2"][random.below(2) as usize], v6), 8080);
    let port = PORTS[random.below(4) as usize];
    let vip: IpAddr = if v6 { "fd00:96::20" } else { "10.96.0.20" }
        .parse()
        .expect("an address");
    let snat = *SNAT.start() + random.below(4) as u16;
    let (from, to) = match random.below(8) {
        0..4 => (client_address, fixture.own(v6, port)),
        4 => (client_address, SocketAddr::new(vip, [80, 81][random.below(2) as usize])),
        5 => (backend, client_address),
        6 => (backend, fixture.own(v6, snat)),
        _ => (backend, SocketAddr::new(vip, 80)),
    };
    let kinds = [
        PacketKind::Syn,
        PacketKind::Syn,
        PacketKind::SynAck,
        PacketKind::Ack,
        PacketKind::Rst,
        PacketKind::Datagram,
        PacketKind::Datagram,
    ];
    TestPacket {
        ttl: [1, 2, 64, 255][random.below(4) as usize],
        payload: (0..[0, 1, 8, 33, 1400, 1460][random.below(6) as usize])
            .map(|_| random.next_u64() as u8)
            .collect(),
        ..TestPacket::new(kinds[random.below(7) as usize], from, to)
    }
}

/// Damages a packet: changes, removes, inserts or randomizes bytes.
fn damage(bytes: &mut Vec<u8>, random: &mut Random) {
    let at = |random: &mut Random, len: usize| random.below(len as u64) as usize;
    // Mostly in the headers, which the programs read.
    for _ in 0..=random.below(3) {
        let end = bytes.len().min(80);
        let place = at(random, end);
        match random.below(8) {
            0 => bytes.truncate(14.max(at(random, end) + 1)),
            1 => bytes.insert(place, random.next_u64() as u8),
            2 => bytes[14..].fill_with(|| random.next_u64() as u8),
            3 if bytes.len() > 24 => {
                // The bytes that the parser decides on: version, lengths, protocol, fragments.
                let decides = [12, 13, 14, 16, 17, 18, 19, 20, 21, 23];
                bytes[decides[at(random, decides.len())]] = random.next_u64() as u8;
            }
            _ => bytes[place] ^= 1 << random.below(8),
        }
    }
    if bytes.len() < 15 {
        bytes.resize(15, 0);
    }
}

/// Checks what must hold for a packet and the result of a program.
fn check_result(before: &[u8], link: usize, verdict: i32, after: &[u8], was_valid: bool) -> Result<()> {
    ensure!([UNSPEC, SHOT, REDIRECT].contains(&verdict), "verdict {verdict}");
    if before == after || verdict == SHOT {
        // An unchanged packet is never redirected.
        ensure!(verdict != REDIRECT, "redirected unchanged");
        return Ok(());
    }
    if !was_valid {
        if verdict == UNSPEC {
            expect_only_rewritten_fields(before, link, after)?;
        }
        return Ok(());
    }
    // A redirected packet without a link layer has got room for a header.
    let after = match after.strip_prefix(&[0; 14]) {
        Some(sent) if link == 0 && verdict == REDIRECT => sent,
        _ => after,
    };
    let framed = |bytes: &[u8]| {
        if link == 0 {
            [&before_link(bytes)[..], bytes].concat()
        } else {
            bytes.to_vec()
        }
    };
    let after = framed(after);
    checked(&after).map(drop).context("in the translated packet")?;
    if let (UNSPEC, Ok(new)) = (verdict, TestPacket::read(&after)) {
        let old = TestPacket::read(&framed(before))?;
        // Only addresses and ports differ.
        ensure!(
            new == TestPacket {
                from: new.from,
                to: new.to,
                ..old.clone()
            },
            "{old:?} became {new:?}"
        );
    }
    Ok(())
}

/// Fails if a packet that continues differs in more than addresses, ports, checksums and the time to live.
fn expect_only_rewritten_fields(before: &[u8], link: usize, after: &[u8]) -> Result<()> {
    ensure!(before.len() == after.len(), "the length changed");
    // Version, lengths, fragments, protocol.
    let kept = if before[link] >> 4 == 4 {
        [0..link + 8, link + 9..link + 10]
    } else {
        [0..link + 7, 0..0]
    };
    for part in kept {
        ensure!(before[part.clone()] == after[part], "other header fields changed");
    }
    Ok(())
}

/// Returns a link-layer header for a packet without one.
fn before_link(packet: &[u8]) -> [u8; 14] {
    let mut header = [0; 14];
    header[12..].copy_from_slice(if packet[0] >> 4 == 4 { &[8, 0] } else { &[0x86, 0xdd] });
    header
}

#[test]
fn random_packets_are_translated_correctly_or_left_alone() -> Result<()> {
    let seconds: Option<u64> = env::var(SECONDS).ok().map(|text| text.parse()).transpose()?;
    let end = Instant::now() + Duration::from_secs(seconds.unwrap_or(0));
    let mut random = Random::from_env();
    let mut fixture = Fixture::new()?;
    // No device here needs the programs without a link layer.
    loader::load_device_programs(fixture.reconciler.maps_mut().programs_mut(), Layer::Network)?;
    for (number, (name, node)) in [("here", "n1"), ("there", "n2")].into_iter().enumerate() {
        let backends = [false, true].map(|v6| (fixture.pod(node, v6), node));
        fixture.serve(name, 20 + number as u8, PORTS[number], &backends);
    }
    fixture.serve("empty", 22, PORTS[2], &[]);
    let wanted = scaled_count_above(PACKETS, LEAST_PACKETS);
    let mut count = 0_u64;
    let mut seen = BTreeMap::new();
    while count < wanted || Instant::now() < end {
        count += 1;
        let packet = valid_packet(&fixture, &mut random);
        let was_valid = random.below(3) == 0;
        let mut bytes = packet.bytes();
        if !was_valid {
            damage(&mut bytes, &mut random);
        }
        let (mut program, device) = HOOKS[random.below(HOOKS.len() as u64) as usize];
        let mut link = 14;
        // Without a link-layer header, the kernel still requires as many bytes as one has.
        if random.below(4) == 0 && bytes.len() > 2 * 14 {
            program = [program_name::INGRESS_L3, program_name::EGRESS_L3][random.below(2) as usize];
            link = 0;
            bytes.drain(..14);
        }
        let (verdict, after) = match fixture.run(program, device, &bytes) {
            Ok(done) => done,
            // The kernel itself rejects the packet.
            Err(_) if !was_valid => continue,
            Err(error) => return Err(error).with_context(|| format!("{program} at {device}: {packet:?}")),
        };
        *seen.entry((verdict, bytes == after, was_valid)).or_insert(0_u64) += 1;
        check_result(&bytes, link, verdict, &after, was_valid)
            .with_context(|| format!("{program} at {device}: {bytes:02x?} became {after:02x?} ({verdict})"))?;
    }
    println!("{count} packets; (verdict, unchanged, valid): {seen:?}");
    for verdict in [UNSPEC, SHOT, REDIRECT] {
        ensure!(seen.keys().any(|(is, ..)| *is == verdict), "never {verdict}: {seen:?}");
    }
    ensure!(
        seen.contains_key(&(UNSPEC, false, true)),
        "nothing was translated: {seen:?}"
    );
    Ok(())
}
