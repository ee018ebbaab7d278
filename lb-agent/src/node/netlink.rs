//! Requests to netlink, and their answers.

use std::io;
use std::time::Duration;

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_ECHO, NLM_F_REQUEST, NetlinkDeserializable, NetlinkHeader, NetlinkMessage,
    NetlinkPayload, NetlinkSerializable,
};
use netlink_sys::{Socket, SocketAddr};
use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::time::{TimeVal, TimeValLike as _};

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
    pub(super) fn list<M>(&mut self, question: M, each: impl FnMut(M)) -> io::Result<Listing>
    where
        M: NetlinkSerializable + NetlinkDeserializable,
    {
        self.list_as(question, each)
    }

    /// The same, with answers of another type than the question.
    pub(super) fn list_as<A>(
        &mut self,
        question: impl NetlinkSerializable,
        mut each: impl FnMut(A),
    ) -> io::Result<Listing>
    where
        A: NetlinkDeserializable,
    {
        self.send(question, NLM_F_REQUEST | NLM_F_DUMP)?;
        let mut listing = Listing::Whole;
        loop {
            let done = self.receive(|header, payload: NetlinkPayload<A>| {
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

    /// Asks for one thing: the last that is told of it.
    pub(super) fn ask<A: NetlinkDeserializable>(&mut self, question: impl NetlinkSerializable) -> io::Result<A> {
        // Some answers are told to who listens only, but for an echo.
        self.send(question, NLM_F_REQUEST | NLM_F_ACK | NLM_F_ECHO)?;
        let mut answer = None;
        loop {
            let done = self.receive(|_, payload: NetlinkPayload<A>| match payload {
                NetlinkPayload::InnerMessage(message) => {
                    answer = Some(message);
                    Ok(false)
                }
                NetlinkPayload::Error(error) if error.code.is_some() => Err(error.to_io()),
                NetlinkPayload::Error(_) => Ok(true),
                _ => Ok(false),
            })?;
            if done {
                return answer.ok_or_else(|| io::ErrorKind::NotFound.into());
            }
        }
    }

    /// Asks for something to be done, and waits until it is.
    pub(super) fn order<M>(&mut self, order: M) -> io::Result<()>
    where
        M: NetlinkSerializable + NetlinkDeserializable,
    {
        self.order_with(order, 0)
    }

    /// The same, with more flags: `NLM_F_CREATE`, `NLM_F_EXCL`, `NLM_F_REPLACE`.
    pub(super) fn order_with<M>(&mut self, order: M, flags: u16) -> io::Result<()>
    where
        M: NetlinkSerializable + NetlinkDeserializable,
    {
        self.send(order, NLM_F_REQUEST | NLM_F_ACK | flags)?;
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

/// A socket that is told of changes.
pub(super) struct Subscription(Socket);

impl Subscription {
    /// Subscribes to groups (bits `RTMGRP_*`) of a family. Nobody waits longer than `patience`.
    pub(super) fn open(family: isize, groups: u32, patience: Duration) -> io::Result<Self> {
        let mut socket = Socket::new(family)?;
        socket.bind(&SocketAddr::new(0, groups))?;
        let patience = TimeVal::milliseconds(patience.as_millis() as i64);
        setsockopt(&socket, sockopt::ReceiveTimeout, &patience)?;
        Ok(Self(socket))
    }

    /// Waits until something may have changed, be it told or lost, or patience is at its end; takes everything else that
    /// was told until then.
    pub(super) fn wait(&self) -> io::Result<()> {
        let mut flags = 0;
        loop {
            match self.take(flags) {
                Ok(()) => flags = libc::MSG_DONTWAIT,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error),
            }
        }
    }

    /// Takes one message, whatever it says: what there is now is listed afterwards.
    fn take(&self, flags: libc::c_int) -> io::Result<()> {
        let mut start = Vec::with_capacity(64);
        match self.0.recv(&mut start, flags) {
            // More was told than the socket could keep.
            Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(()),
            result => result.map(drop),
        }
    }
}

fn invalid(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("netlink: {what}"))
}
