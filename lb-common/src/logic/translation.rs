//! Tuples of packets, and the changes of checksums between the original and the translated tuple.

use super::checksum::Sum;
use super::ip128::Ip128;
use super::packet::Packet;

/// Addresses and ports of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tuple {
    /// Source address.
    pub src: Ip128,
    /// Destination address.
    pub dst: Ip128,
    /// Source port, host byte order.
    pub src_port: u16,
    /// Destination port, host byte order.
    pub dst_port: u16,
}

impl Tuple {
    /// Returns the tuple of a packet.
    #[inline(always)]
    #[must_use]
    pub const fn of(packet: &Packet) -> Self {
        Self {
            src: packet.src,
            dst: packet.dst,
            src_port: packet.src_port,
            dst_port: packet.dst_port,
        }
    }

    /// Returns the tuple of a reply: source and destination exchanged.
    #[inline(always)]
    #[must_use]
    pub const fn reversed(self) -> Self {
        Self {
            src: self.dst,
            dst: self.src,
            src_port: self.dst_port,
            dst_port: self.src_port,
        }
    }

    /// Returns the change of the sum of the addresses from this tuple to `new`, which must be of the same family. The prefix of
    /// v4-mapped addresses cancels out: in ones' complement, a word minus itself is zero.
    #[inline(always)]
    #[must_use]
    pub const fn addresses_to(&self, new: &Self) -> Sum {
        // No branch skips the prefix: the verifier rejected a version with one, whose compiled code used registers that one of
        // the paths does not initialize.
        let (Ip128([a, b]), Ip128([c, d])) = (self.src, self.dst);
        let (Ip128([e, f]), Ip128([g, h])) = (new.src, new.dst);
        let old = Sum::ZERO.sub_u64(a).sub_u64(b).sub_u64(c).sub_u64(d);
        old.add_u64(e).add_u64(f).add_u64(g).add_u64(h)
    }

    /// Returns both ports as the first word of the transport header, in its memory order.
    #[inline(always)]
    #[must_use]
    pub const fn ports(&self) -> u32 {
        let ([a, b], [c, d]) = (self.src_port.to_be_bytes(), self.dst_port.to_be_bytes());
        u32::from_ne_bytes([a, b, c, d])
    }

    /// Returns the change of the sum of the ports from this tuple to `new`.
    #[inline(always)]
    #[must_use]
    pub const fn ports_to(&self, new: &Self) -> Sum {
        Sum::ZERO.sub(self.ports()).add(new.ports())
    }
}
