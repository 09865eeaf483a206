//! Whole connections between two pods: application, proxy, wire, proxy, application.

mod admitting;
mod carrying;
mod leaving;

use super::{testing::*, *};
use crate::{
    mesh::policy::Authorization,
    testing::{eventually, within},
};
use std::{io::ErrorKind, sync::Arc, time::Duration};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

async fn read_to_end(socket: &mut TcpStream) -> std::io::Result<Vec<u8>> {
    let mut all = Vec::new();
    within("the end", socket.read_to_end(&mut all)).await?;
    Ok(all)
}

async fn expect(socket: &mut TcpStream, text: &[u8]) {
    let mut got = vec![0; text.len()];
    within("bytes", socket.read_exact(&mut got)).await.unwrap();
    assert_eq!(got, text);
}

/// Every read gives an error or the end; which of the two says how the connection was ended.
async fn ending(socket: &mut TcpStream) -> Result<(), ErrorKind> {
    let mut buffer = vec![0; 1 << 16];
    loop {
        match within("the end", socket.read(&mut buffer)).await {
            Ok(0) => return Ok(()),
            Ok(_) => {}
            Err(error) => return Err(error.kind()),
        }
    }
}

fn reset(socket: TcpStream) {
    socket2::SockRef::from(&socket)
        .set_linger(Some(Duration::ZERO))
        .unwrap();
}
