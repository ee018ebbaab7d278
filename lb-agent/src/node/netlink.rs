//! Netlink requests and responses.

use std::io;
use std::time::Duration;

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_ECHO, NLM_F_REQUEST, NetlinkDeserializable, NetlinkHeader, NetlinkMessage,
    NetlinkPayload, NetlinkSerializable,
};
use netlink_sys::{Socket, SocketAddr};
use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::time::{TimeVal, TimeValLike as _};

/// Maximum size of one datagram of a listing (`netlink_dump`), which is larger than any other response.
const DATAGRAM: usize = 64 * 1024;

/// `NLM_F_DUMP_INTR`: the listed objects changed during the listing.
const DUMP_INTERRUPTED: u16 = 0x10;

/// A socket to a netlink family, of the network namespace that the thread is in when it is opened.
pub(super) struct Netlink {
    socket: Socket,
    datagram: Vec<u8>,
}

/// The result of a listing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Listing {
    /// Every object that existed throughout was listed.
    Whole,
    /// The objects changed during the listing: some may be missing or listed twice.
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

    /// Requests a listing and passes each of its messages on.
    pub(super) fn list<M>(&mut self, request: M, each: impl FnMut(M)) -> io::Result<Listing>
    where
        M: NetlinkSerializable + NetlinkDeserializable,
    {
        self.list_as(request, each)
    }

    /// Requests a listing with responses of another type than the request.
    pub(super) fn list_as<A>(
        &mut self,
        request: impl NetlinkSerializable,
        mut each: impl FnMut(A),
    ) -> io::Result<Listing>
    where
        A: NetlinkDeserializable,
    {
        self.send(request, NLM_F_REQUEST | NLM_F_DUMP)?;
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

    /// Requests one object and returns the last message about it.
    pub(super) fn get<A: NetlinkDeserializable>(&mut self, request: impl NetlinkSerializable) -> io::Result<A> {
        // Some responses go to subscribers only, unless NLM_F_ECHO is set.
        self.send(request, NLM_F_REQUEST | NLM_F_ACK | NLM_F_ECHO)?;
        let mut response = None;
        loop {
            let done = self.receive(|_, payload: NetlinkPayload<A>| match payload {
                NetlinkPayload::InnerMessage(message) => {
                    response = Some(message);
                    Ok(false)
                }
                NetlinkPayload::Error(error) if error.code.is_some() => Err(error.to_io()),
                NetlinkPayload::Error(_) => Ok(true),
                _ => Ok(false),
            })?;
            if done {
                return response.ok_or_else(|| io::ErrorKind::NotFound.into());
            }
        }
    }

    /// Requests a change, and waits for its acknowledgment.
    pub(super) fn change<M>(&mut self, change: M) -> io::Result<()>
    where
        M: NetlinkSerializable + NetlinkDeserializable,
    {
        self.change_with(change, 0)
    }

    /// Requests a change with additional flags: `NLM_F_CREATE`, `NLM_F_EXCL`, `NLM_F_REPLACE`.
    pub(super) fn change_with<M>(&mut self, change: M, flags: u16) -> io::Result<()>
    where
        M: NetlinkSerializable + NetlinkDeserializable,
    {
        self.send(change, NLM_F_REQUEST | NLM_F_ACK | flags)?;
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

    /// Receives one datagram, and passes its messages on up to the last one.
    fn receive<M: NetlinkDeserializable>(
        &mut self,
        mut each: impl FnMut(&NetlinkHeader, NetlinkPayload<M>) -> io::Result<bool>,
    ) -> io::Result<bool> {
        self.datagram.clear();
        // With MSG_TRUNC the length is that of the datagram, even if it did not fit.
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

/// A socket that receives notifications of changes.
pub(super) struct Subscription(Socket);

impl Subscription {
    /// Subscribes to groups (bits `RTMGRP_*`) of a family. A wait ends after `timeout`.
    pub(super) fn open(family: isize, groups: u32, timeout: Duration) -> io::Result<Self> {
        let mut socket = Socket::new(family)?;
        socket.bind(&SocketAddr::new(0, groups))?;
        let timeout = TimeVal::milliseconds(timeout.as_millis() as i64);
        setsockopt(&socket, sockopt::ReceiveTimeout, &timeout)?;
        Ok(Self(socket))
    }

    /// Waits until something may have changed, whether the notification arrived or was lost, or until `timeout` ends;
    /// takes all other pending notifications.
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

    /// Takes one message without regard to its contents: a listing follows.
    fn take(&self, flags: libc::c_int) -> io::Result<()> {
        let mut start = Vec::with_capacity(64);
        match self.0.recv(&mut start, flags) {
            // More notifications arrived than the socket's buffer holds.
            Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(()),
            result => result.map(drop),
        }
    }
}

fn invalid(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("netlink: {what}"))
}
