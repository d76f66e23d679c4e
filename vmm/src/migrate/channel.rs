//! The channels of a link: QUIC streams, each with its urgency, that carry frames.
//!
//! A stream begins with one byte that says which channel it is; then frames follow: a length (4 bytes, little-endian) and so many
//! bytes. QUIC sends the most urgent channel's data first, whatever was queued before on the others.

use std::sync::Arc;

use bytes::Bytes;
use migration_proto::wire::Channel;
use quinn::{ReadExactError, RecvStream, SendStream};
use tokio::time::timeout;

use super::transport::Link;
use super::{MigrateError, limits};

fn name(channel: Channel) -> &'static str {
    match channel {
        Channel::Control => "control",
        Channel::Faults => "faults",
        Channel::Wants => "wants",
        Channel::Names => "names",
        Channel::Literals => "literals",
    }
}

/// The byte that a stream begins with.
fn tag(channel: Channel) -> u8 {
    match channel {
        Channel::Control => 1,
        Channel::Wants => 2,
        Channel::Names => 3,
        Channel::Literals => 4,
        Channel::Faults => 5,
    }
}

/// QUIC's priority of a stream: the greater, the more urgent.
fn priority(channel: Channel) -> i32 {
    match channel {
        Channel::Control => 4,
        Channel::Faults => 3,
        Channel::Wants => 2,
        Channel::Names => 1,
        Channel::Literals => 0,
    }
}

/// The longest frame that a channel may carry, bytes.
#[must_use]
pub fn max_frame_bytes(channel: Channel) -> usize {
    match channel {
        Channel::Control => limits::MAX_CONTROL_FRAME_BYTES,
        Channel::Faults => limits::MAX_FAULTS_FRAME_BYTES,
        Channel::Wants => limits::MAX_WANTS_FRAME_BYTES,
        Channel::Names => limits::MAX_NAMES_FRAME_BYTES,
        Channel::Literals => limits::MAX_LITERALS_FRAME_BYTES,
    }
}

/// The sending side of a channel.
#[derive(Debug)]
pub struct FrameWriter {
    channel: Channel,
    stream: SendStream,
    link: Link,
}

/// The receiving side of a channel.
#[derive(Debug)]
pub struct FrameReader {
    channel: Channel,
    stream: RecvStream,
    link: Link,
}

/// The channels as the source has them.
#[derive(Debug)]
pub struct SourceChannels {
    /// To the destination.
    pub control: FrameWriter,
    /// From the destination.
    pub control_in: FrameReader,
    /// Manifests out.
    pub names: FrameWriter,
    /// Page bytes out.
    pub literals: FrameWriter,
}

/// The channels as the destination has them.
#[derive(Debug)]
pub struct DestinationChannels {
    /// To the source.
    pub control: FrameWriter,
    /// From the source.
    pub control_in: FrameReader,
    /// Manifests in.
    pub names: FrameReader,
    /// Page bytes in.
    pub literals: FrameReader,
    /// Wants out.
    pub wants: FrameWriter,
}

/// Opens the channels of a link that this end, the source, has made. It waits for nothing that comes from the other end: see [`accept_wants`].
///
/// # Errors
/// If the connection is lost.
pub async fn open_source(link: &Link) -> Result<SourceChannels, MigrateError> {
    within(link, async {
        let (control, control_in) = link.connection().open_bi().await.map_err(|e| lost(link, &e))?;
        let control = FrameWriter::open(link, Channel::Control, control).await?;
        let control_in = FrameReader { channel: Channel::Control, stream: control_in, link: link.clone() };
        let names = open_uni(link, Channel::Names).await?;
        let literals = open_uni(link, Channel::Literals).await?;
        Ok(SourceChannels { control, control_in, names, literals })
    })
    .await
}

/// Takes the channel of wants, as the source, which has a round trip's worth to say before the destination can have opened it.
///
/// # Errors
/// If the connection is lost, another channel is opened, or none within [`limits::CONNECT_TIMEOUT`].
pub async fn accept_wants(link: Link) -> Result<FrameReader, MigrateError> {
    let wants = within(&link, accept_uni(&link)).await?;
    if wants.channel != Channel::Wants {
        return Err(frame_error(wants.channel, "it is not the destination's to open"));
    }
    Ok(wants)
}

/// Opens the channels of a link that this end, the destination, has accepted.
///
/// # Errors
/// As [`open_source`].
pub async fn open_destination(link: &Link) -> Result<DestinationChannels, MigrateError> {
    within(link, async {
        let (control, control_in) = link.connection().accept_bi().await.map_err(|e| lost(link, &e))?;
        let control_in = FrameReader::open(link, control_in).await?;
        if control_in.channel != Channel::Control {
            return Err(frame_error(control_in.channel, "it is not a two-way channel"));
        }
        let control = FrameWriter::adopt(link, Channel::Control, control)?;
        let wants = open_uni(link, Channel::Wants).await?;
        let (first, second) = (accept_uni(link).await?, accept_uni(link).await?);
        let (names, literals) = match (first.channel, second.channel) {
            (Channel::Names, Channel::Literals) => (first, second),
            (Channel::Literals, Channel::Names) => (second, first),
            (other, _) => return Err(frame_error(other, "names and literals were to be opened, once each")),
        };
        Ok(DestinationChannels { control, control_in, names, literals, wants })
    })
    .await
}

/// Opens the channel of faults, as the source. The other channels do not wait for it: a destination of the version before takes no such stream, and
/// has to be there to refuse the offer.
///
/// # Errors
/// If the connection is lost.
pub async fn open_faults(link: Link) -> Result<(FrameWriter, FrameReader), MigrateError> {
    let (faults, faults_in) = link.connection().open_bi().await.map_err(|e| lost(&link, &e))?;
    let faults = FrameWriter::open(&link, Channel::Faults, faults).await?;
    Ok((faults, FrameReader { channel: Channel::Faults, stream: faults_in, link }))
}

/// Takes the channel of faults, as the destination. A source of the version before never opens it.
///
/// # Errors
/// If the connection is lost, or another channel is opened.
pub async fn accept_faults(link: Link) -> Result<(FrameWriter, FrameReader), MigrateError> {
    let (faults, faults_in) = link.connection().accept_bi().await.map_err(|e| lost(&link, &e))?;
    let faults_in = FrameReader::open(&link, faults_in).await?;
    if faults_in.channel != Channel::Faults {
        return Err(frame_error(faults_in.channel, "it is open already, or not a two-way channel"));
    }
    Ok((FrameWriter::adopt(&link, Channel::Faults, faults)?, faults_in))
}

async fn within<T>(
    link: &Link,
    opening: impl Future<Output = Result<T, MigrateError>>,
) -> Result<T, MigrateError> {
    let late = || MigrateError::ConnectionLost {
        address: link.address(),
        why: "its channels were not opened in time".into(),
    };
    timeout(limits::CONNECT_TIMEOUT, opening).await.map_err(|_| late())?
}

async fn open_uni(link: &Link, channel: Channel) -> Result<FrameWriter, MigrateError> {
    let stream = link.connection().open_uni().await.map_err(|e| lost(link, &e))?;
    FrameWriter::open(link, channel, stream).await
}

async fn accept_uni(link: &Link) -> Result<FrameReader, MigrateError> {
    let stream = link.connection().accept_uni().await.map_err(|e| lost(link, &e))?;
    FrameReader::open(link, stream).await
}

impl FrameWriter {
    fn adopt(link: &Link, channel: Channel, stream: SendStream) -> Result<Self, MigrateError> {
        stream.set_priority(priority(channel)).map_err(|e| lost(link, &e))?;
        Ok(Self { channel, stream, link: link.clone() })
    }

    async fn open(link: &Link, channel: Channel, stream: SendStream) -> Result<Self, MigrateError> {
        let mut writer = Self::adopt(link, channel, stream)?;
        writer.stream.write_all(&[tag(channel)]).await.map_err(|e| lost(link, &e))?;
        Ok(writer)
    }

    /// The connection.
    #[must_use]
    pub fn link(&self) -> &Link {
        &self.link
    }

    /// Hands one frame to QUIC; returns when all of it is in QUIC's send buffer.
    ///
    /// # Errors
    /// If the frame is longer than the channel's bound (a bug of this end), or the connection is lost.
    pub async fn send(&mut self, frame: Bytes) -> Result<(), MigrateError> {
        let most = max_frame_bytes(self.channel);
        let length = u32::try_from(frame.len()).ok().filter(|_| frame.len() <= most);
        let Some(length) = length else {
            return Err(frame_error(
                self.channel,
                &format!("a frame of {} bytes, at most {most} are allowed", frame.len()),
            ));
        };
        let mut chunks = [Bytes::copy_from_slice(&length.to_le_bytes()), frame];
        self.stream.write_all_chunks(&mut chunks).await.map_err(|e| lost(&self.link, &e))
    }

    /// Says that no frame follows, and waits until the other end has acknowledged all that was sent.
    ///
    /// # Errors
    /// If the connection is lost before.
    pub async fn flush(&mut self) -> Result<(), MigrateError> {
        self.finish()?;
        self.stream.stopped().await.map(|_| ()).map_err(|e| lost(&self.link, &e))
    }

    /// Says that no frame follows.
    ///
    /// # Errors
    /// If the stream is closed already.
    pub fn finish(&mut self) -> Result<(), MigrateError> {
        self.stream.finish().map_err(|e| lost(&self.link, &e))
    }
}

impl FrameReader {
    /// Which channel it is.
    #[must_use]
    pub fn channel(&self) -> Channel {
        self.channel
    }

    async fn open(link: &Link, mut stream: RecvStream) -> Result<Self, MigrateError> {
        let mut first = [0];
        stream.read_exact(&mut first).await.map_err(|e| lost(link, &e))?;
        let all = [Channel::Control, Channel::Faults, Channel::Wants, Channel::Names, Channel::Literals];
        let channel = all.into_iter().find(|c| tag(*c) == first[0]).ok_or_else(|| MigrateError::Frame {
            channel: "unknown",
            why: format!("a stream of the kind {}", first[0]).into(),
        })?;
        Ok(Self { channel, stream, link: link.clone() })
    }

    /// The connection.
    #[must_use]
    pub fn link(&self) -> &Link {
        &self.link
    }

    /// The next frame; `None` when the other end has finished the channel between two frames.
    ///
    /// # Errors
    /// A frame that is too long or cut short, or a lost connection.
    pub async fn next(&mut self) -> Result<Option<Bytes>, MigrateError> {
        let mut length = [0; 4];
        match self.stream.read_exact(&mut length).await {
            Ok(()) => {}
            Err(ReadExactError::FinishedEarly(0)) => return Ok(None),
            Err(ReadExactError::FinishedEarly(_)) => {
                return Err(frame_error(self.channel, "it ends within a frame's length"));
            }
            Err(ReadExactError::ReadError(e)) => return Err(lost(&self.link, &e)),
        }
        let length = u32::from_le_bytes(length) as usize;
        let most = max_frame_bytes(self.channel);
        if length > most {
            return Err(frame_error(
                self.channel,
                &format!("a frame of {length} bytes, at most {most} are allowed"),
            ));
        }
        let mut frame = vec![0; length];
        match self.stream.read_exact(&mut frame).await {
            Ok(()) => Ok(Some(frame.into())),
            Err(ReadExactError::FinishedEarly(_)) => Err(frame_error(self.channel, "it ends within a frame")),
            Err(ReadExactError::ReadError(e)) => Err(lost(&self.link, &e)),
        }
    }
}

fn frame_error(channel: Channel, why: &str) -> MigrateError {
    MigrateError::Frame { channel: name(channel), why: why.into() }
}

fn lost(link: &Link, error: &dyn std::error::Error) -> MigrateError {
    link.failure().unwrap_or_else(|| {
        let why: Arc<str> = error.to_string().into();
        MigrateError::ConnectionLost { address: link.address(), why }
    })
}

#[cfg(test)]
mod tests;
