//! Programs as filters of a clsact qdisc, by netlink: for kernels without tcx.
//!
//! Foreign filters are never changed, and only attributes that identify a filter are read. A filter is lb's by its
//! position (priority, protocol and handle) and its name.

use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd};

use lb_common::abi::program_name;
use netlink_packet_core::{
    DecodeError, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE, NetlinkDeserializable, NetlinkHeader, NlasIterator,
};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::tc::{
    TcAttribute, TcBpfFlags, TcFilterBpf, TcFilterBpfOption, TcHandle, TcHeader, TcMessage, TcOption,
};
use netlink_sys::protocols::NETLINK_ROUTE;

use super::netlink::Netlink;

/// The highest priority: filters with a lower number run first.
const PRIORITY: u32 = 1;
/// `ETH_P_ALL`, in network byte order.
const EVERY_PROTOCOL: u32 = (libc::ETH_P_ALL as u16).to_be() as u32;
/// The handle of lb's filter among filters of the same priority: "lb".
const HANDLE: u32 = 0x6c62;
const CLSACT: &str = "clsact";

/// `TCA_KIND` and `TCA_OPTIONS` (`linux/rtnetlink.h`).
const TCA_KIND: u16 = 1;
const TCA_OPTIONS: u16 = 2;
/// `TCA_BPF_NAME` and `TCA_BPF_ID` (`linux/pkt_cls.h`).
const TCA_BPF_NAME: u16 = 7;
const TCA_BPF_ID: u16 = 11;

/// The direction of the packets that a program sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    /// Received packets.
    Ingress,
    /// Sent packets.
    Egress,
}

impl Side {
    pub(crate) const BOTH: [Self; 2] = [Self::Ingress, Self::Egress];

    fn parent(self) -> TcHandle {
        let minor = match self {
            Self::Ingress => TcHandle::MIN_INGRESS,
            Self::Egress => TcHandle::MIN_EGRESS,
        };
        TcHandle {
            minor,
            ..TcHandle::CLSACT
        }
    }
}

/// The filter at lb's position.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum FilterSlot {
    /// No filter.
    Empty,
    /// A filter of lb's, with the program of this id.
    Ours(u32),
    /// A foreign filter.
    Foreign,
}

/// The filters of the network namespace in which this was opened.
pub(crate) struct Filters(Netlink);

impl Filters {
    /// Opens a netlink socket in the network namespace of the calling thread.
    pub(crate) fn open() -> io::Result<Self> {
        Netlink::open(NETLINK_ROUTE).map(Self)
    }

    /// Returns the filter at lb's position in a direction of a device.
    pub(crate) fn at(&mut self, index: u32, side: Side) -> io::Result<FilterSlot> {
        match self
            .0
            .get::<TcObject>(RouteNetlinkMessage::GetTrafficFilter(lb_filter(index, side)))
        {
            Ok(object) => Ok(object.slot()),
            Err(error) if is_missing(&error) => Ok(FilterSlot::Empty),
            Err(error) => Err(error),
        }
    }

    /// Adds a program at lb's position, or replaces the one there, in one step. The qdisc must exist.
    pub(crate) fn attach(&mut self, index: u32, side: Side, name: &str, program: BorrowedFd<'_>) -> io::Result<()> {
        if self.at(index, side)? == FilterSlot::Foreign {
            return Err(io::Error::other(format!(
                "a foreign filter of priority {PRIORITY} already has lb's handle"
            )));
        }
        let mut message = lb_filter(index, side);
        message.attributes.push(TcAttribute::Options(vec![
            TcOption::Bpf(TcFilterBpfOption::ProgFd(program.as_raw_fd() as u32)),
            TcOption::Bpf(TcFilterBpfOption::ProgName(name.to_owned())),
            TcOption::Bpf(TcFilterBpfOption::Flags(TcBpfFlags::DirectAction)),
        ]));
        let change = RouteNetlinkMessage::NewTrafficFilter(message);
        match self.0.change_with(change, NLM_F_CREATE | NLM_F_REPLACE) {
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Err(io::Error::other(format!(
                "{error} (a filter of another kind may have priority {PRIORITY} there)"
            ))),
            result => result,
        }
    }

    /// Removes lb's filter; false if there is none.
    pub(crate) fn remove(&mut self, index: u32, side: Side) -> io::Result<bool> {
        let FilterSlot::Ours(_) = self.at(index, side)? else {
            return Ok(false);
        };
        match self
            .0
            .change(RouteNetlinkMessage::DelTrafficFilter(lb_filter(index, side)))
        {
            Ok(()) => Ok(true),
            Err(error) if is_missing(&error) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Ensures that a device has a clsact qdisc; true if it was created.
    pub(crate) fn add_qdisc(&mut self, index: u32) -> io::Result<bool> {
        let change = RouteNetlinkMessage::NewQueueDiscipline(clsact(index));
        match self.0.change_with(change, NLM_F_CREATE | NLM_F_EXCL) {
            Ok(()) => Ok(true),
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => {
                let object: TcObject = self.0.get(RouteNetlinkMessage::GetQueueDiscipline(clsact(index)))?;
                if object.kind != CLSACT {
                    return Err(io::Error::other(format!(
                        "the device has a foreign qdisc {:?} in the place of clsact",
                        object.kind
                    )));
                }
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }

    /// Removes the clsact qdisc of a device if no filter of any owner is left.
    pub(crate) fn remove_qdisc(&mut self, index: u32) -> io::Result<()> {
        for side in Side::BOTH {
            let mut request = TcMessage::default();
            request.header.index = index as i32;
            request.header.parent = side.parent();
            let mut is_empty = true;
            self.0
                .list_as(RouteNetlinkMessage::GetTrafficFilter(request), |_: TcObject| {
                    is_empty = false;
                })?;
            if !is_empty {
                return Ok(());
            }
        }
        match self.0.change(RouteNetlinkMessage::DelQueueDiscipline(clsact(index))) {
            Err(error) if !is_missing(&error) => Err(error),
            _ => Ok(()),
        }
    }
}

/// Whether there is no such filter, qdisc, or device (any more).
fn is_missing(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ENODEV))
}

/// lb's position in a direction of a device.
fn lb_filter(index: u32, side: Side) -> TcMessage {
    let mut message = TcMessage::default();
    message.header = TcHeader {
        index: index as i32,
        handle: HANDLE.into(),
        parent: side.parent(),
        info: PRIORITY << 16 | EVERY_PROTOCOL,
        ..TcHeader::default()
    };
    message.attributes.push(TcAttribute::Kind(TcFilterBpf::KIND.to_owned()));
    message
}

/// The qdisc of a device that has filters at both sides.
fn clsact(index: u32) -> TcMessage {
    let mut message = TcMessage::default();
    message.header = TcHeader {
        index: index as i32,
        handle: TcHandle {
            minor: 0,
            ..TcHandle::CLSACT
        },
        parent: TcHandle::CLSACT,
        ..TcHeader::default()
    };
    message.attributes.push(TcAttribute::Kind(CLSACT.to_owned()));
    message
}

/// The attributes of a filter or qdisc that lb reads; foreign ones may have attributes that lb does not
/// understand.
#[derive(Debug, Default)]
struct TcObject {
    kind: String,
    name: String,
    program: u32,
}

impl TcObject {
    fn slot(&self) -> FilterSlot {
        let names = [
            program_name::INGRESS,
            program_name::EGRESS,
            program_name::INGRESS_L3,
            program_name::EGRESS_L3,
        ];
        if self.kind == TcFilterBpf::KIND && names.contains(&self.name.as_str()) {
            FilterSlot::Ours(self.program)
        } else {
            FilterSlot::Foreign
        }
    }
}

impl NetlinkDeserializable for TcObject {
    type Error = DecodeError;

    fn deserialize(_: &NetlinkHeader, payload: &[u8]) -> Result<Self, DecodeError> {
        /// `struct tcmsg`.
        const HEADER: usize = 20;
        let text = |bytes: &[u8]| {
            let text = bytes.split(|byte| *byte == 0).next().unwrap_or_default();
            String::from_utf8_lossy(text).into_owned()
        };
        let mut object = Self::default();
        for attribute in NlasIterator::new(payload.get(HEADER..).unwrap_or_default()) {
            let attribute = attribute?;
            match attribute.kind() {
                TCA_KIND => object.kind = text(attribute.value()),
                TCA_OPTIONS if object.kind == TcFilterBpf::KIND => {
                    for option in NlasIterator::new(attribute.value()) {
                        let option = option?;
                        match option.kind() {
                            TCA_BPF_NAME => object.name = text(option.value()),
                            TCA_BPF_ID => {
                                let id = option.value().try_into().unwrap_or_default();
                                object.program = u32::from_ne_bytes(id);
                            }
                            _ => {}
                        }
                    }
                }
                _ => {}
            }
        }
        Ok(object)
    }
}
