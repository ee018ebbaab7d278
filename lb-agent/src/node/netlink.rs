//! Requests to netlink, and their answers.

use std::io;

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkDeserializable, NetlinkHeader, NetlinkMessage, NetlinkPayload,
    NetlinkSerializable,
};
use netlink_sys::{Socket, SocketAddr};

/// As much as the kernel puts into one datagram of a listing (`netlink_dump`), and more than any other answer.
const DATAGRAM: usize = 64 * 1024;

/// `NLM_F_DUMP_INTR`: what is listed has changed meanwhile.
const DUMP_INTERRUPTED: u16 = 0x10;

/// A socket to a netlink family, of the network namespace that the thread is in when it is opened.
pub(super) struct Netlink {
    socket: Socket,
    datagram: Vec<u8>,
}

/// How a listing ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Listing {
    /// Everything that was there all the time was told.
    Whole,
    /// It changed meanwhile: something may be missing, or told twice.
    Interrupted,
}

impl Netlink {
    /// Opens a socket of a family: `netlink_sys::protocols`.
    pub(super) fn open(family: isize) -> io::Result<Self> {
        let mut socket = Socket::new(family)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        Ok(Self {
            socket,
            datagram: Vec::with_capacity(DATAGRAM),
        })
    }

    /// Asks for a listing and hands over each message of it.
    pub(super) fn list<M>(&mut self, question: M, mut each: impl FnMut(M)) -> io::Result<Listing>
    where
        M: NetlinkSerializable + NetlinkDeserializable,
    {
        self.send(question, NLM_F_REQUEST | NLM_F_DUMP)?;
        let mut listing = Listing::Whole;
        loop {
            let done = self.receive(|header, payload: NetlinkPayload<M>| {
                if header.flags & DUMP_INTERRUPTED != 0 {
                    listing = Listing::Interrupted;
                }
                match payload {
                    NetlinkPayload::InnerMessage(message) => each(message),
                    NetlinkPayload::Done(done) if done.code < 0 => {
                        return Err(io::Error::from_raw_os_error(-done.code));
                    }
                    NetlinkPayload::Done(_) => return Ok(true),
                    NetlinkPayload::Error(error) if error.code.is_some() => return Err(error.to_io()),
                    _ => {}
                }
                Ok(false)
            })?;
            if done {
                return Ok(listing);
            }
        }
    }

    /// Asks for something to be done, and waits until it is.
    pub(super) fn order<M>(&mut self, order: M) -> io::Result<()>
    where
        M: NetlinkSerializable + NetlinkDeserializable,
    {
        self.send(order, NLM_F_REQUEST | NLM_F_ACK)?;
        loop {
            let done = self.receive(|_, payload: NetlinkPayload<M>| match payload {
                NetlinkPayload::Error(error) if error.code.is_some() => Err(error.to_io()),
                NetlinkPayload::Error(_) => Ok(true),
                _ => Ok(false),
            })?;
            if done {
                return Ok(());
            }
        }
    }

    fn send<M: NetlinkSerializable>(&self, payload: M, flags: u16) -> io::Result<()> {
        let mut header = NetlinkHeader::default();
        header.flags = flags;
        let mut message = NetlinkMessage::new(header, NetlinkPayload::InnerMessage(payload));
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        self.socket.send(&bytes, 0).map(drop)
    }

    /// Receives one datagram, and hands over its messages until one is the last.
    fn receive<M: NetlinkDeserializable>(
        &mut self,
        mut each: impl FnMut(&NetlinkHeader, NetlinkPayload<M>) -> io::Result<bool>,
    ) -> io::Result<bool> {
        self.datagram.clear();
        // With MSG_TRUNC the length is that of the datagram, also where it did not fit.
        let length = self.socket.recv(&mut self.datagram, libc::MSG_TRUNC)?;
        let mut rest = self
            .datagram
            .get(..length)
            .ok_or_else(|| invalid("too long an answer"))?;
        while !rest.is_empty() {
            let message = NetlinkMessage::<M>::deserialize(rest).map_err(|error| invalid(&error.to_string()))?;
            if each(&message.header, message.payload)? {
                return Ok(true);
            }
            // Messages are aligned to 4 bytes.
            let length = (message.header.length as usize).next_multiple_of(4);
            rest = rest.get(length..).unwrap_or_default();
        }
        Ok(false)
    }
}

fn invalid(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("netlink: {what}"))
}
